"""The critic's whole loss as a module."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkernels.critic.call import scores_of
from gpkernels.critic.double_backward import depth
from gpkernels.critic.parts import Adversarial, Between, Consistency, CriticLossParts, Task
from gpkernels.critic.step import critic_step, groups_of, step_at_once
from gpkernels.critic.together import Seen
from gpkernels.ops.checks import check_eps, check_nonnegative, check_pair
from gpkernels.ops.consistency import consistency_term
from gpkernels.ops.interpolate import draw_eps
from gpkernels.ops.score_loss import ScoreLoss, gan_discriminator_loss, wgan_critic_loss
from gpkernels.penalties import dragan_penalty, dragan_points, gradient_penalty, r1_penalty, r2_penalty, transformed

LOSSES = {"wgan": wgan_critic_loss, "gan": gan_discriminator_loss}
OBJECTIVES = {  # of real and fake scores
    "wgan": (ScoreLoss.NEGATIVE, ScoreLoss.IDENTITY),
    "gan": (ScoreLoss.SOFTPLUS_NEGATIVE, ScoreLoss.SOFTPLUS),
}
PENALTIES = ("none", "wgan-gp", "r1", "r2", "dragan")


@lru_cache(64)
def _task_of(
    objective: str, target: float, one_sided: bool, weight: float, margin: float, feature_weight: float, wanted: bool
) -> Task:
    on_real, on_fake = OBJECTIVES[objective]
    adversarial = Adversarial(on_real, on_fake, objective == "wgan")
    consistency = Consistency(weight, margin, feature_weight) if weight > 0 else None
    return Task(adversarial, target, one_sided, False, consistency, wanted)


class CriticLoss(nn.Module):
    """adversarial + penalty_weight * penalty + consistency_weight * consistency.

    Args:
        critic: maps (N, *) to scores, or to (scores, features) where the consistency term is to see features.
        objective: "wgan" or "gan".
        penalty: "wgan-gp" (with target, one_sided), "r1", "r2", "dragan" (with target, dragan_scale) or "none".
        consistency_weight: above 0 adds CT-GAN's term between two passes over the real batch (Wei et al. 2018); the
            first of them gives the adversarial scores.
        together: whether real, fake and penalised samples go through the critic as one batch. None: from the third
            call on, where each sample was seen to keep to itself. As one batch dropout draws one mask for all samples,
            buffers that change change once, and rounding may differ in the last bit; apart, the critic sees what it
            sees in plain PyTorch, in the order fake, real, penalised. Without a penalty they go apart.

    Raises:
        TypeError, ValueError: naming the argument; also for ``together=True`` where samples meet.
    """

    def __init__(
        self,
        critic: nn.Module,
        *,
        objective: str = "wgan",
        penalty: str = "wgan-gp",
        penalty_weight: float = 10.0,
        target: float = 1.0,
        one_sided: bool = False,
        dragan_scale: float = 0.5,
        consistency_weight: float = 0.0,
        consistency_margin: float = 0.0,
        feature_weight: float = 0.1,
        together: bool | None = None,
    ) -> None:
        super().__init__()
        if not callable(critic):
            raise TypeError(f"critic: expected a module or a callable, got {type(critic).__name__}")
        for name, value, choices in (("objective", objective, OBJECTIVES), ("penalty", penalty, PENALTIES)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        self.critic = critic
        self.objective = objective
        self.penalty = penalty
        self.penalty_weight = check_nonnegative("penalty_weight", penalty_weight)
        self.target = check_nonnegative("target", target)
        self.one_sided = bool(one_sided)
        self.dragan_scale = check_nonnegative("dragan_scale", dragan_scale)
        self.consistency_weight = check_nonnegative("consistency_weight", consistency_weight)
        self.consistency_margin = check_nonnegative("consistency_margin", consistency_margin)
        self.feature_weight = check_nonnegative("feature_weight", feature_weight)
        if together not in (None, True, False):
            raise TypeError(f"together: expected None, True or False, got {together!r}")
        self.together = together
        self._seen = Seen()

    def forward(self, real: Tensor, fake: Tensor, *, eps: Tensor | None = None) -> CriticLossParts:
        """real, fake: (N, *), one shape; eps as in ``gradient_penalty``. Gives scalars, of which loss has the graph."""
        if is_compiling() and self._seen.untraced is self.critic:
            from gpkernels.critic.traced import outside

            return outside(self._eagerly, real, fake, eps)
        if is_compiling() and not transformed():
            return CriticLossParts(*self._in_graph(*self._checked(real, fake, eps), eps))
        if transformed() or depth():
            return self._composed(*self._checked(real, fake, eps), eps)
        return self._eagerly(real, fake, eps)

    def _eagerly(self, real: Tensor, fake: Tensor, eps: Tensor | None) -> CriticLossParts:
        points = self._points(real, fake, eps) if isinstance(real, Tensor) else None
        how = self._task(torch.is_grad_enabled()), self.penalty_weight, self.together, self._seen
        parts = step_at_once(self.critic, real, fake, points, *how)
        if not isinstance(parts, CriticLossParts):
            first, second = self._checked(real, fake, eps)
            if isinstance(points, Between):
                points = points._replace(real=first, fake=second)
            elif points is not None:
                points = first if points is real else second if points is fake else points
            parts = critic_step(self.critic, first, second, points, *how, parts)
        return parts

    def _checked(self, real: Tensor, fake: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both in one dtype, and told apart by identity."""
        check_pair("real", real, "fake", fake)
        if eps is not None:
            check_eps(eps, real)
        if real.dtype != fake.dtype:
            dtype = torch.promote_types(real.dtype, fake.dtype)
            real, fake = real.to(dtype), fake.to(dtype)
        return real, fake.view_as(fake) if fake is real else fake

    def _task(self, wanted: bool) -> Task:
        """What is asked for now: options may have changed."""
        target = 0.0 if self.penalty in ("r1", "r2", "none") else self.target
        one_sided = self.one_sided and self.penalty == "wgan-gp"
        task_of = _task_of.__wrapped__ if is_compiling() else _task_of
        return task_of(
            self.objective,
            target,
            one_sided,
            self.consistency_weight,
            self.consistency_margin,
            self.feature_weight,
            wanted,
        )

    def _points(self, real: Tensor, fake: Tensor, eps: Tensor | None) -> Tensor | Between | None:
        """Where the gradient is penalised; ``real`` or ``fake`` itself shares its pass with the scores."""
        if self.penalty == "wgan-gp":
            return Between(real, fake, draw_eps(real) if eps is None else eps)
        if self.penalty == "dragan":
            return dragan_points(real, self.dragan_scale)
        return {"r1": real, "r2": fake, "none": None}[self.penalty]

    def _in_graph(self, real: Tensor, fake: Tensor, eps: Tensor | None) -> Any:
        """The parts for the compiler to trace."""
        from gpkernels.critic.traced import step_in_graph  # it imports the compiler, which is at work here

        points = self._points(real, fake, eps)
        gradients = torch.is_grad_enabled()
        wants = gradients and (real.requires_grad or fake.requires_grad)
        task = self._task(gradients)
        groups = sorted(groups_of(self.critic, real, fake, points, task, wants), key=lambda group: group.penalised)
        calls = [groups] if self.together and points is not None else [[group] for group in groups]
        seen = self._seen if self.together is None and points is not None else None
        otherwise = lambda: self._eagerly(real, fake, eps)  # noqa: E731
        return step_in_graph(self.critic, calls, task, self.penalty_weight, otherwise, wants=wants, seen=seen)

    def _composed(self, real: Tensor, fake: Tensor, eps: Tensor | None) -> CriticLossParts:
        """Part by part, by autograd."""
        first = self.critic(real)
        adversarial = LOSSES[self.objective](scores_of(first), scores_of(self.critic(fake)))
        penalty = self._penalty(real, fake, eps)
        loss = adversarial if self.penalty == "none" else adversarial + self.penalty_weight * penalty
        consistency = torch.zeros_like(adversarial)
        if self.consistency_weight > 0:
            consistency = self._consistency(first, self.critic(real))
            loss = loss + self.consistency_weight * consistency
        return CriticLossParts(loss, adversarial.detach(), penalty.detach(), consistency.detach())

    def _penalty(self, real: Tensor, fake: Tensor, eps: Tensor | None) -> Tensor:
        if self.penalty == "wgan-gp":
            return gradient_penalty(self.critic, real, fake, target=self.target, one_sided=self.one_sided, eps=eps)
        if self.penalty == "r1":
            return r1_penalty(self.critic, real)
        if self.penalty == "r2":
            return r2_penalty(self.critic, fake)
        if self.penalty == "dragan":
            return dragan_penalty(self.critic, real, target=self.target, scale=self.dragan_scale)
        return torch.zeros((), device=real.device)

    def _consistency(self, first: Any, second: Any) -> Tensor:
        features = [out[1] if isinstance(out, (tuple, list)) and len(out) > 1 else None for out in (first, second)]
        return consistency_term(
            scores_of(first),
            scores_of(second),
            *features,
            margin=self.consistency_margin,
            feature_weight=self.feature_weight,
        )

    def extra_repr(self) -> str:
        return f"objective={self.objective}, penalty={self.penalty}, penalty_weight={self.penalty_weight}"
