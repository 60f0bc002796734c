"""The systems of the papers: one small file for each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptrainer.algorithms.gan import LSGAN, Hinge, NoisyGAN, dragan, gan, nsgan
from gptrainer.algorithms.ssl_ct_gan import SemiSupervisedCTGAN
from gptrainer.algorithms.system import Setup, System
from gptrainer.algorithms.unrolled import UnrolledGAN
from gptrainer.algorithms.wgan import WGANGP, ct_gan, wgan
from gptrainer.algorithms.zero_centred import R3GAN, ZeroCentred
from gptrainer.config import TrainConfig

__all__ = ["BUILDERS", "Setup", "System", "build_system"]

BUILDERS: dict[str, Callable[[Any, Setup], System]] = {
    "gan": gan,
    "nsgan": nsgan,
    "gan-noise": NoisyGAN,
    "hinge": Hinge,
    "lsgan": LSGAN,
    "wgan": wgan,
    "wgan-gp": WGANGP,
    "ct-gan": ct_gan,
    "r1": ZeroCentred,
    "r2": ZeroCentred,
    "r3gan": R3GAN,
    "dragan": dragan,
    "unrolled": UnrolledGAN,
    "ssl-ct-gan": SemiSupervisedCTGAN,
}


def build_system(config: TrainConfig, setup: Setup) -> System:
    """Build the system that a config is of."""
    return BUILDERS[config.algorithm](config, setup)
