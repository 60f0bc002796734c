"""Data types of a critic's loss: the task, its terms and the result."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.ops.gradient_norm_penalty import (
    REDUCTIONS,
    gradient_norm_penalty,
    gradient_norm_penalty_reference,
)
from gpkernels.ops.interpolate import interpolate_op
from gpkernels.ops.score_loss import ScoreLoss


class Adversarial(NamedTuple):
    """Losses of real and fake scores: the mean of each with its target, or one loss of their pairs.

    linear: whether both are linear in the scores.
    """

    real: ScoreLoss
    fake: ScoreLoss
    linear: bool = False
    real_target: float = 0.0
    fake_target: float = 0.0
    paired: bool = False

    def of(self, name: str) -> tuple[ScoreLoss, float] | None:
        """Return the loss and the target of a group's scores, or None for groups without one."""
        if name == "real":
            return self.real, self.real_target
        return (self.fake, self.fake_target) if name == "fake" else None


class Consistency(NamedTuple):
    """Constants of CT-GAN's term between two passes over the real batch."""

    weight: float
    margin: float
    feature_weight: float


class Between(NamedTuple):
    """Interpolates of real and fake samples, not yet computed."""

    real: Tensor
    fake: Tensor
    eps: Tensor

    def points(self) -> Tensor:
        real, fake, eps = (x.detach() for x in self)
        mixed: Tensor = interpolate_op(real, fake, eps)
        return mixed


def points_of(points: Tensor | Between) -> Tensor:
    """Return points as a tensor, computing interpolates."""
    return points.points() if isinstance(points, Between) else points


def rows_of_group(x: Tensor, groups: Sequence[tuple[str, bool]], name: str) -> Tensor:
    """Return a group's part of a tensor in which all groups of a call are one after the other."""
    if len(groups) == 1:
        return x
    size = x.shape[0] // len(groups)
    return x.narrow(0, [group for group, _ in groups].index(name) * size, size)


def called(pack: int) -> str:
    """Return the name of the argument that a task differentiates; pack: as in ``Task``."""
    return "critic" if pack else "field"


def constant_scores(name: str = "critic") -> Exception:
    """Return the error for scores that do not depend on the input; name: of the argument that gives them."""
    if torch.is_inference_mode_enabled():
        return RuntimeError(f"{name}: torch.inference_mode() records no gradients; use torch.no_grad()")
    return ValueError(f"{name}: expected scores that depend on the input, got scores that do not")


class CriticLossParts(NamedTuple):
    """Loss of a critic and its unweighted parts, as :class:`CriticLoss` returns them.

    Args:
        loss (Tensor): the weighted sum, which has the graph.
        adversarial (Tensor): adversarial loss, detached.
        penalty (Tensor or dict): gradient penalty before it is weighted, detached; 0 without a penalty; a dict of
            penalties by name where :class:`CriticLoss` was given one.
        consistency (Tensor): consistency term before it is weighted, detached; 0 without one.

    Shape:
        - Every part is a scalar.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> parts = gpkernels.CriticLoss(critic)(torch.randn(8, 2), torch.randn(8, 2))
        >>> parts.loss.requires_grad, parts.penalty.requires_grad
        (True, False)
    """

    loss: Tensor
    adversarial: Tensor
    penalty: Any
    consistency: Tensor


class Norm(NamedTuple):
    """Penalty on the norm of gradients, as ``gradient_norm_penalty`` defines it; reduction: its code."""

    target: float
    one_sided: bool = False
    power: float = 2.0
    reduction: int = REDUCTIONS["mean"]

    def of(self, gradient: Tensor, pack: int) -> Tensor:
        """Compute the penalty on a gradient, with its graph; pack: as in ``Task``."""
        if is_compiling():  # a custom function is compiled anew for every target
            return self._composed(gradient, gradient.shape[:-1] if not pack else (gradient.shape[0] // pack,))
        reduction = next(name for name, code in REDUCTIONS.items() if code == self.reduction)
        options = {"one_sided": self.one_sided, "reduction": reduction, "power": self.power}
        if not pack:
            value = gradient_norm_penalty(gradient.reshape(-1, gradient.shape[-1]), self.target, **options)  # type: ignore[arg-type]
            return value if value.dim() == 0 else value.reshape(gradient.shape[:-1])
        return gradient_norm_penalty(gradient, self.target, **options, pack=pack)  # type: ignore[arg-type]

    def _composed(self, gradient: Tensor, shape: Sequence[int]) -> Tensor:
        """Compute the penalty of PyTorch's operations; shape: of the norms."""
        rows = gradient.reshape(prod(shape), gradient.numel() // prod(shape))
        value = gradient_norm_penalty_reference(rows, self.target, self.one_sided, self.reduction, self.power)[0]
        return value if value.dim() == 0 else value.reshape(shape)


class Task(NamedTuple):
    """Quantities that the passes compute.

    adversarial: None for a penalty alone. penalties: by name, in the order of their weights. gradients: whether weight
    gradients are computed. pack: number of consecutive samples with one score and one norm; 0: norms are over the last
    axis alone, and the number of scores is free. several: whether penalties are returned by name, even a single one.
    """

    adversarial: Adversarial | None
    penalties: tuple[tuple[str, Norm], ...]
    consistency: Consistency | None
    gradients: bool
    pack: int = 1
    several: bool = False

    @property
    def shares(self) -> tuple[str, ...]:
        """Names of the penalties at samples that are scored."""
        return tuple([name for name, _ in self.penalties if name in ("r1", "r2")])

    def penalty(self, group: str) -> int:
        """Return the index of a group's penalty: its own, or that at the scored samples of the group."""
        name = {"real": "r1", "fake": "r2"}.get(group, group)
        return [own for own, _ in self.penalties].index(name)

    def rows(self, gradient: Tensor) -> Tensor:
        """Reshape a gradient to one row per norm."""
        if self.pack == 1:
            return gradient
        return gradient.reshape(-1, self.pack * prod(gradient.shape[1:]) if self.pack else gradient.shape[-1])
