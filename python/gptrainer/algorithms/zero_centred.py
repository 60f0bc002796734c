"""R1 and R2: zero-centred penalties on real or generated data, taken at every step or lazily."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gpkernels
from gpkernels.critic.parts import CriticLossParts
from gptrainer.algorithms.system import Setup, System
from gptrainer.config import filled
from gptrainer.optimiser import Adam


class ZeroCentred(System):
    """The non-saturating game with gamma/2 E |grad D|^2 at real (R1) or generated (R2) data (Mescheder et al. 2018,
    eqs. 9 and 10).

    lazy > 1: the penalty at every lazy-th critic step only, times lazy, with the critic's learning rate and betas
    corrected for the fewer terms (Karras et al. 2020, appendix B).
    """

    def __init__(self, setup: Setup) -> None:
        config, lazy = setup.config, filled(setup.config.lazy)
        loss = LazyPenalty(setup.critic, config.algorithm, filled(config.gamma) / 2 * lazy, setup.together)
        correction = lazy / (lazy + 1) if lazy > 1 else 1.0
        first, second = filled(config.betas)
        optimisers = (
            Adam(setup.critic.parameters(), filled(config.lr) * correction, (first**correction, second**correction)),
            Adam(setup.generator.parameters(), filled(config.generator_lr), (first, second)),
        )
        super().__init__(setup, loss, gpkernels.nonsaturating_generator_loss, optimisers, ("penalty",))
        self.lazy = lazy
        self.critic_steps = 0
        self.last_penalty = torch.zeros(())

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.critic_steps = step * filled(self.config.n_critic)

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
    """The critic's loss with a penalty when it is due and without when it is not: one module, so that its gradients
    are averaged over processes in one place."""

    def __init__(self, critic: nn.Module, penalty: str, weight: float, together: bool) -> None:
        super().__init__()
        self.with_penalty = gpkernels.CriticLoss(
            critic, objective="gan", penalty=penalty, penalty_weight=weight, together=together
        )
        self.without = gpkernels.CriticLoss(critic, objective="gan", penalty="none")

    def forward(self, real: Tensor, fake: Tensor, due: bool) -> CriticLossParts:
        """real, fake: (N, *)."""
        parts: CriticLossParts = (self.with_penalty if due else self.without)(real, fake)
        return parts
