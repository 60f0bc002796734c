"""The GAN with instance noise."""

from __future__ import annotations

from torch import Tensor

from gptrainer.algorithms.system import Setup, System
from gptrainer.systems import NoisyGANConfig


class NoisyGAN(System):
    """The minimax game on data and samples with added N(0, sigma^2), sigma falling linearly to 0 (Sønderby et al. 2017,
    section 3.2; Arjovsky and Bottou 2017, section 3)."""

    def __init__(self, config: NoisyGANConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.initial_sigma, self.noise_steps = config.noise, config.resolved("noise_steps")
        self.sigma = config.noise

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.sigma = self.initial_sigma * max(0.0, 1 - step / self.noise_steps)

    def critic_input(self, x: Tensor) -> Tensor:
        return self.draws.noisy(x, self.sigma)
