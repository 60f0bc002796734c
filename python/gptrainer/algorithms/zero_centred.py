"""R1, R2 and R3GAN: zero-centred penalties on real and generated data, at every step or lazily."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gpkernels
from gpkernels.critic.parts import CriticLossParts
from gptrainer.algorithms.system import Setup, System
from gptrainer.systems import R1Config


class ZeroCentred(System):
    """The non-saturating game with gamma/2 E |grad D|^2 at real (R1) or generated (R2) data (Mescheder et al. 2018,
    eqs. 9 and 10).

    lazy > 1: the penalty at every lazy-th critic step only, times lazy, with the critic's learning rate and betas
    corrected for the fewer terms (Karras et al. 2020, appendix B).
    """

    def __init__(self, config: R1Config, setup: Setup) -> None:
        super().__init__(config, setup)
        self.n_critic, self.lazy = config.n_critic, config.lazy
        self.critic_steps = 0
        self.last_penalty = torch.zeros(())

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.critic_steps = step * self.n_critic

    def critic_parts(self, real: Tensor, fake: Tensor) -> CriticLossParts:
        """Compute the loss; its penalty is the sum of those of the last step that had any."""
        due = self.critic_steps % self.lazy == 0
        self.critic_steps += 1
        parts: CriticLossParts = self.critic_loss(real, fake, with_penalty=due)
        if due:
            self.last_penalty = torch.stack(list(parts.penalty.values())).sum()
        return parts._replace(penalty=self.last_penalty)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last_penalty": self.last_penalty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last_penalty = state["last_penalty"]


class R3GAN(ZeroCentred):
    """Huang et al. 2024, eq. 2 and Algorithm 1: critic and generator of pairs, both penalties."""

    def loss_of_generated(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            real_scores = self.critic(real)
        return gpkernels.relativistic_generator_loss(real_scores, self.critic(fake))
