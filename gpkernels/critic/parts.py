"""Data types of a critic's loss: the task, its terms and the result."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gpkernels.ops.interpolate import interpolate_op
from gpkernels.ops.score_loss import ScoreLoss


class Adversarial(NamedTuple):
    """Score losses of real and fake rows, and whether both are linear."""

    real: ScoreLoss
    fake: ScoreLoss
    linear: bool


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


def constant_scores() -> ValueError:
    """Return the error for scores that do not depend on the input."""
    return ValueError("critic: expected scores that depend on the input, got scores that do not")


class CriticLossParts(NamedTuple):
    """Loss of a critic and its unweighted parts, as :class:`CriticLoss` returns them.

    Args:
        loss (Tensor): the weighted sum, which has the graph.
        adversarial (Tensor): adversarial loss, detached.
        penalty (Tensor): gradient penalty before it is weighted, detached; 0 without a penalty.
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
    penalty: Tensor
    consistency: Tensor


class Task(NamedTuple):
    """Terms of a loss. adversarial: None for a penalty alone; by_point: norms are over the last axis alone."""

    adversarial: Adversarial | None
    target: float
    one_sided: bool
    by_point: bool
    consistency: Consistency | None
    gradients: bool
