"""WGAN-GP, and CT-GAN, which adds a consistency term."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gptrainer.algorithms.system import Parts, Setup, System
from gptrainer.systems import CTGANConfig


class WGANGP(System):
    """Gulrajani et al. 2017, Algorithm 1: the gradient penalty in place of clipping."""

    def critic_parts(self, real: Tensor, fake: Tensor) -> Parts:
        parts: Parts = self.critic_loss(real, fake, eps=self.draws.uniform(real))
        return parts


class CTGAN(WGANGP):
    """Wei et al. 2018, as their code trains.

    D' and D'' are two passes over the same real batch, D_ the last feature layer. The penalty and the generator see
    the critic with dropout too. The critic has ``with_features`` (``gptrainer.models.layers``).
    """

    def __init__(self, config: CTGANConfig, setup: Setup) -> None:
        super().__init__(config, setup, setup.critic_loss(config, WithFeatures(setup.critic)))


class WithFeatures(nn.Module):
    """A critic that returns (scores, features), as ``CriticLoss`` expects for the consistency term."""

    def __init__(self, critic: Any) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, *) to (N, 1) and (N, d)."""
        scores, features = self.critic.with_features(x)
        return scores, features
