"""R1 and R2: zero-centred penalties on real or generated data, at every step or lazily."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gpkernels
from gpkernels.critic.parts import CriticLossParts
from gptrainer.algorithms.system import Setup, System, adam
from gptrainer.systems import R1Config


class ZeroCentred(System):
    """The non-saturating game with gamma/2 E |grad D|^2 at real (R1) or generated (R2) data (Mescheder et al. 2018,
    eqs. 9 and 10).

    lazy > 1: the penalty at every lazy-th critic step only, times lazy, with the critic's learning rate and betas
    corrected for the fewer terms (Karras et al. 2020, appendix B).
    """

    def __init__(self, config: R1Config, setup: Setup) -> None:
        lazy = config.lazy
        loss = LazyPenalty(setup.critic, config.algorithm, config.gamma / 2 * lazy, setup.together)
        optimisers = adam(config, setup, lazy)
        super().__init__(config, setup, loss, gpkernels.nonsaturating_generator_loss, optimisers, ("penalty",))
        self.n_critic = config.n_critic
        self.lazy = lazy
        self.critic_steps = 0
        self.last_penalty = torch.zeros(())

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.critic_steps = step * self.n_critic

    def critic_parts(self, real: Tensor, fake: Tensor) -> CriticLossParts:
        due = self.critic_steps % self.lazy == 0
        self.critic_steps += 1
        parts: CriticLossParts = self.critic_loss(real, fake, due)
        if due:
            self.last_penalty = parts.penalty
        return parts._replace(penalty=self.last_penalty)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last_penalty": self.last_penalty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last_penalty = state["last_penalty"]


class LazyPenalty(nn.Module):
    """The critic's loss, with the penalty only when it is due; one module, for DistributedDataParallel."""

    def __init__(self, critic: nn.Module, penalty: str, weight: float, together: bool) -> None:
        super().__init__()
        self.with_penalty = gpkernels.CriticLoss(
            critic, objective="gan", penalty=penalty, penalty_weight=weight, together=together
        )
        self.without = gpkernels.CriticLoss(critic, objective="gan", penalty="none")

    def forward(self, real: Tensor, fake: Tensor, due: bool) -> CriticLossParts:
        """Compute the loss of real and fake, (N, *)."""
        parts: CriticLossParts = (self.with_penalty if due else self.without)(real, fake)
        return parts
