"""The original game with either generator loss, with instance noise, and with DRAGAN's penalty."""

from __future__ import annotations

from torch import Tensor

import gpkernels
from gptrainer.algorithms.system import Setup, System, adam
from gptrainer.systems import DRAGANConfig, GANConfig, NoisyGANConfig


def gan(config: GANConfig, setup: Setup) -> System:
    """Goodfellow et al. 2014, eq. 1: the generator minimises E log(1 - D(G(z)))."""
    return System(config, setup, _logistic(setup), gpkernels.saturating_generator_loss, adam(config, setup))


def nsgan(config: GANConfig, setup: Setup) -> System:
    """Goodfellow et al. 2014, section 3: the generator minimises -E log D(G(z))."""
    return System(config, setup, _logistic(setup), gpkernels.nonsaturating_generator_loss, adam(config, setup))


def dragan(config: DRAGANConfig, setup: Setup) -> System:
    """Kodali et al. 2017, Algorithm 1, with the non-saturating loss of their code."""
    loss = gpkernels.CriticLoss(
        setup.critic,
        objective="gan",
        penalty="dragan",
        penalty_weight=config.penalty_weight,
        dragan_scale=config.scale,
        together=setup.together,
    )
    return System(config, setup, loss, gpkernels.nonsaturating_generator_loss, adam(config, setup), ("penalty",))


class NoisyGAN(System):
    """The minimax game on data and samples with added N(0, sigma^2), sigma falling linearly to 0 (Sønderby et al. 2017,
    section 3.2; Arjovsky and Bottou 2017, section 3)."""

    def __init__(self, config: NoisyGANConfig, setup: Setup) -> None:
        super().__init__(config, setup, _logistic(setup), gpkernels.saturating_generator_loss, adam(config, setup))
        self.initial_sigma, self.noise_steps = config.noise, config.resolved("noise_steps")
        self.sigma = config.noise

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.sigma = self.initial_sigma * max(0.0, 1 - step / self.noise_steps)

    def critic_input(self, x: Tensor) -> Tensor:
        return self.draws.noisy(x, self.sigma)


def _logistic(setup: Setup) -> gpkernels.CriticLoss:
    return gpkernels.CriticLoss(setup.critic, objective="gan", penalty="none")
