"""The systems of the papers, a small file a family."""

from __future__ import annotations

from collections.abc import Callable

from gptrainer.algorithms.ct_gan import CTGAN
from gptrainer.algorithms.dragan import dragan
from gptrainer.algorithms.gan import GANWithNoise, gan, nsgan
from gptrainer.algorithms.ssl_ct_gan import SemiSupervisedCTGAN
from gptrainer.algorithms.system import Setup, System
from gptrainer.algorithms.unrolled import UnrolledGAN
from gptrainer.algorithms.wgan import WGANGP, wgan
from gptrainer.algorithms.zero_centred import ZeroCentred

__all__ = ["BUILDERS", "Setup", "System", "build_system"]

BUILDERS: dict[str, Callable[[Setup], System]] = {
    "gan": gan,
    "nsgan": nsgan,
    "gan-noise": GANWithNoise,
    "wgan": wgan,
    "wgan-gp": WGANGP,
    "ct-gan": CTGAN,
    "r1": ZeroCentred,
    "r2": ZeroCentred,
    "dragan": dragan,
    "unrolled": UnrolledGAN,
    "ssl-ct-gan": SemiSupervisedCTGAN,
}


def build_system(setup: Setup) -> System:
    """The system that a run names."""
    return BUILDERS[setup.config.algorithm](setup)
