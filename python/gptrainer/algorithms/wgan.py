"""The Wasserstein GAN: by clipping, by gradient penalty, and with CT-GAN's consistency term."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import gpkernels
from gpkernels.critic.parts import CriticLossParts
from gptrainer.algorithms.system import Setup, WassersteinSystem, adam
from gptrainer.systems import CTGANConfig, WGANConfig, WGANGPConfig


def wgan(config: WGANConfig, setup: Setup) -> WassersteinSystem:
    """Arjovsky et al. 2017, Algorithm 1: RMSprop, and weights clipped to [-c, c] after each critic step."""
    optimisers = (
        gpkernels.optim.RMSprop(setup.critic.parameters(), lr=config.lr, clip=config.clip),
        gpkernels.optim.RMSprop(setup.generator.parameters(), lr=config.resolved("generator_lr")),
    )
    loss = gpkernels.CriticLoss(setup.critic, penalty="none")
    return WassersteinSystem(config, setup, loss, gpkernels.wgan_generator_loss, optimisers)


class WGANGP(WassersteinSystem):
    """Gulrajani et al. 2017, Algorithm 1: the gradient penalty in place of clipping."""

    def __init__(self, config: WGANGPConfig, setup: Setup, critic: nn.Module | None = None, **consistency: Any) -> None:
        """critic: what the loss calls, by default the network itself. consistency: options of ``CriticLoss``."""
        loss = gpkernels.CriticLoss(
            critic or setup.critic,
            penalty_weight=config.penalty_weight,
            one_sided=config.one_sided,
            together=setup.together,
            **consistency,
        )
        terms = ("penalty", "consistency") if consistency else ("penalty",)
        super().__init__(config, setup, loss, gpkernels.wgan_generator_loss, adam(config, setup), terms)

    def critic_parts(self, real: Tensor, fake: Tensor) -> CriticLossParts:
        parts: CriticLossParts = self.critic_loss(real, fake, eps=self.draws.uniform(real))
        return parts


def ct_gan(config: CTGANConfig, setup: Setup) -> WGANGP:
    """Wei et al. 2018, as their code trains: lambda_2 max(0, (D' - D'')^2 + 0.1 mean_j (D_' - D_'')^2 - M/lambda_2).

    D' and D'' are two passes over the same real batch, D_ the last feature layer. The penalty and the generator see
    the critic with dropout too. The critic has ``with_features`` (``gptrainer.models.layers``).
    """
    weight = config.consistency_weight
    # The code subtracts the margin from the weighted distance, CriticLoss from the distance itself.
    margin = config.consistency_margin / weight if weight else 0.0
    features = WithFeatures(setup.critic)
    return WGANGP(config, setup, features, consistency_weight=weight, consistency_margin=margin)


class WithFeatures(nn.Module):
    """A critic that returns (scores, features), as ``CriticLoss`` expects for the consistency term."""

    def __init__(self, critic: Any) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, *) to (N, 1) and (N, d)."""
        scores, features = self.critic.with_features(x)
        return scores, features
