"""The systems of the papers: the base, which most are an instance of, and a class for each that differs."""

from __future__ import annotations

from torch import nn

from gptrainer.algorithms.ssl_ct_gan import SemiSupervisedCTGAN
from gptrainer.algorithms.system import System
from gptrainer.algorithms.variants import CTGAN, R3GAN, NoisyGAN, UnrolledGAN, ZeroCentred
from gptrainer.config import TrainConfig
from gptrainer.processes import Draws

__all__ = ["System", "build_system"]

CLASSES: dict[str, type[System]] = {
    "gan-noise": NoisyGAN,
    "ct-gan": CTGAN,
    "r1": ZeroCentred,
    "r2": ZeroCentred,
    "r3gan": R3GAN,
    "unrolled": UnrolledGAN,
    "ssl-ct-gan": SemiSupervisedCTGAN,
}


def build_system(config: TrainConfig, generator: nn.Module, critic: nn.Module, draws: Draws) -> System:
    """Build the system that a config is of."""
    return CLASSES.get(config.algorithm, System)(config, generator, critic, draws)
