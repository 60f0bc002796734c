"""The Wasserstein GAN, by clipping and by gradient penalty."""

from __future__ import annotations

from torch import Tensor

import gpkernels
from gpkernels.critic.parts import CriticLossParts
from gptrainer.algorithms.system import Setup, WassersteinSystem, adam
from gptrainer.config import filled


def wgan(setup: Setup) -> WassersteinSystem:
    """Arjovsky et al. 2017, Algorithm 1: RMSprop, and weights clipped to [-c, c] after each critic step."""
    config = setup.config
    optimisers = (
        gpkernels.optim.RMSprop(setup.critic.parameters(), lr=filled(config.lr), clip=config.clip),
        gpkernels.optim.RMSprop(setup.generator.parameters(), lr=filled(config.generator_lr)),
    )
    loss = gpkernels.CriticLoss(setup.critic, penalty="none")
    return WassersteinSystem(setup, loss, gpkernels.wgan_generator_loss, optimisers)


class WGANGP(WassersteinSystem):
    """Gulrajani et al. 2017, Algorithm 1: the gradient penalty in place of clipping."""

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        loss = gpkernels.CriticLoss(
            setup.critic,
            penalty_weight=filled(config.penalty_weight),
            one_sided=config.one_sided,
            together=setup.together,
        )
        super().__init__(setup, loss, gpkernels.wgan_generator_loss, adam(setup), ("penalty",))

    def critic_parts(self, real: Tensor, fake: Tensor) -> CriticLossParts:
        parts: CriticLossParts = self.critic_loss(real, fake, eps=self.draws.uniform(real))
        return parts
