"""GANs without a Wasserstein critic: logistic, with instance noise, DRAGAN, hinge, least squares."""

from __future__ import annotations

from torch import Tensor

import gpkernels
from gptrainer.algorithms.system import Setup, System, adam
from gptrainer.systems import DRAGANConfig, GANConfig, HingeConfig, LSGANConfig, NoisyGANConfig


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


class Hinge(System):
    """Lim and Ye 2017, eqs. 13 and 14: hinge loss of the critic, a linear one of the generator."""

    estimate = "total_variation_estimate"

    def __init__(self, config: HingeConfig, setup: Setup) -> None:
        loss = gpkernels.CriticLoss(setup.critic, objective="hinge", penalty="none")
        super().__init__(config, setup, loss, gpkernels.wgan_generator_loss, adam(config, setup))

    def estimated(self, adversarial: Tensor) -> Tensor:
        """TV >= 1 - L/2, equal for the best critic (Lim and Ye 2017, theorem 1)."""
        return 1 - adversarial / 2


class LSGAN(System):
    """Mao et al. 2017, eq. 9: squared distances of the scores from 1 for real and 0 for generated samples."""

    estimate = "triangular_estimate"

    def __init__(self, config: LSGANConfig, setup: Setup) -> None:
        loss = gpkernels.CriticLoss(setup.critic, objective="least-squares", penalty="none")
        super().__init__(config, setup, loss, gpkernels.least_squares_generator_loss, adam(config, setup))

    def estimated(self, adversarial: Tensor) -> Tensor:
        """Half the triangular discrimination, int (p - q)^2 / (p + q) / 2 >= 1 - 2L, equal for the best critic."""
        return 1 - 2 * adversarial


def _logistic(setup: Setup) -> gpkernels.CriticLoss:
    return gpkernels.CriticLoss(setup.critic, objective="gan", penalty="none")
