"""The systems of the papers: the base, which most are an instance of, and a class for each that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptrainer.algorithms.ssl_ct_gan import SemiSupervisedCTGAN
from gptrainer.algorithms.system import Setup, System
from gptrainer.algorithms.unrolled import UnrolledGAN
from gptrainer.algorithms.variants import CTGAN, R3GAN, NoisyGAN, ZeroCentred
from gptrainer.config import TrainConfig

__all__ = ["Setup", "System", "build_system"]

BUILDERS: dict[str, Callable[[Any, Setup], System]] = {
    "gan-noise": NoisyGAN,
    "ct-gan": CTGAN,
    "r1": ZeroCentred,
    "r2": ZeroCentred,
    "r3gan": R3GAN,
    "unrolled": UnrolledGAN,
    "ssl-ct-gan": SemiSupervisedCTGAN,
}


def build_system(config: TrainConfig, setup: Setup) -> System:
    """Build the system that a config is of."""
    return BUILDERS.get(config.algorithm, System)(config, setup)
