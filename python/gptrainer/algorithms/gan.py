"""The original game, with either loss for the generator, and with noise on what the critic sees."""

from __future__ import annotations

from torch import Tensor

import gpkernels
from gptrainer.algorithms.system import Setup, System, adam
from gptrainer.config import filled


def gan(setup: Setup) -> System:
    """Goodfellow et al. 2014, eq. 1: the generator minimises E log(1 - D(G(z)))."""
    return System(setup, _logistic(setup), gpkernels.saturating_generator_loss, adam(setup))


def nsgan(setup: Setup) -> System:
    """Goodfellow et al. 2014, section 3: the generator minimises -E log D(G(z))."""
    return System(setup, _logistic(setup), gpkernels.nonsaturating_generator_loss, adam(setup))


class GANWithNoise(System):
    """The minimax game on data and samples with added N(0, sigma^2), sigma falling linearly to 0 (Sønderby et al. 2017,
    section 3.2; Arjovsky and Bottou 2017, section 3)."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, _logistic(setup), gpkernels.saturating_generator_loss, adam(setup))
        self.sigma = filled(setup.config.noise)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.sigma = filled(self.config.noise) * max(0.0, 1 - step / filled(self.config.noise_steps))

    def shown(self, x: Tensor) -> Tensor:
        return self.draws.noisy(x, self.sigma)


def _logistic(setup: Setup) -> gpkernels.CriticLoss:
    return gpkernels.CriticLoss(setup.critic, objective="gan", penalty="none")
