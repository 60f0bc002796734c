"""CT-GAN: WGAN-GP whose critic must say the same of a real sample under two dropout masks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import gpkernels
from gpkernels.critic.parts import CriticLossParts
from gptrainer.algorithms.system import Setup, WassersteinSystem, adam
from gptrainer.config import filled


class CTGAN(WassersteinSystem):
    """Wei et al. 2018, as their code trains: lambda_2 max(0, (D' - D'')^2 + 0.1 mean_j (D_' - D_'')^2 - M/lambda_2).

    D' and D'' are two passes over the same real batch, D_ the last feature layer. The penalty and the generator see
    the critic with dropout too. The critic has ``with_features`` (``gptrainer.models.layers``).
    """

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        weight = filled(config.consistency_weight)
        loss = gpkernels.CriticLoss(
            WithFeatures(setup.critic),
            penalty_weight=filled(config.penalty_weight),
            one_sided=config.one_sided,
            together=setup.together,
            consistency_weight=weight,
            # The code weights the distance before it takes the margin off, CriticLoss after.
            consistency_margin=filled(config.consistency_margin) / weight if weight else 0.0,
        )
        super().__init__(setup, loss, gpkernels.wgan_generator_loss, adam(setup), ("penalty", "consistency"))

    def critic_parts(self, real: Tensor, fake: Tensor) -> CriticLossParts:
        parts: CriticLossParts = self.critic_loss(real, fake, eps=self.draws.uniform(real))
        return parts


class WithFeatures(nn.Module):
    """A critic as ``CriticLoss`` wants it for the consistency term: a call gives (scores, features)."""

    def __init__(self, critic: Any) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, *). Gives (N, 1) and (N, d)."""
        scores, features = self.critic.with_features(x)
        return scores, features
