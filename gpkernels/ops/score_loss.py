"""score_loss: adversarial losses, sums of mean phi(scores) with a kind of phi for each tensor of scores."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import logsigmoid

from gpkernels.ops.checks import check_finite, check_same_device, check_scores
from gpkernels.ops.differentiable import Differentiable, apply, second_order
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import accumulation_dtype, new_wide, promote


class ScoreLoss(IntEnum):
    """Kinds of phi: csrc/formulas.h has the same."""

    IDENTITY = 0  # s
    NEGATIVE = 1  # -s
    SOFTPLUS = 2  # softplus(s)
    SOFTPLUS_NEGATIVE = 3  # softplus(-s)
    NEGATIVE_SOFTPLUS = 4  # -softplus(s)
    HINGE = 5  # max(0, 1 + s)
    HINGE_NEGATIVE = 6  # max(0, 1 - s)
    LEAST_SQUARES = 7  # (s - target)^2

    __hash__ = int.__hash__  # in C: kinds are keys of what a critic step looks up


_KINDS = frozenset(ScoreLoss)


def score_loss_reference(scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]) -> Tensor:
    """The sum over tensors of mean phi(scores): phi is that of its kind. Only LEAST_SQUARES has a target."""
    check_kinds(scores, kinds, targets)
    total: Tensor | None = None
    for s, kind, target in zip(scores, kinds, targets, strict=True):
        wide = s.to(accumulation_dtype(s.dtype))
        if kind == ScoreLoss.IDENTITY:
            value = wide
        elif kind == ScoreLoss.NEGATIVE:
            value = -wide
        elif kind == ScoreLoss.SOFTPLUS:
            value = -logsigmoid(-wide)
        elif kind == ScoreLoss.SOFTPLUS_NEGATIVE:
            value = -logsigmoid(wide)
        elif kind == ScoreLoss.NEGATIVE_SOFTPLUS:
            value = logsigmoid(-wide)
        elif kind == ScoreLoss.HINGE:
            value = (1 + wide).relu()
        elif kind == ScoreLoss.HINGE_NEGATIVE:
            value = (1 - wide).relu()
        else:
            value = (wide - target) * (wide - target)
        total = value.mean() if total is None else total + value.mean()
    assert total is not None
    return total


def score_loss_backward_reference(
    cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]
) -> list[Tensor]:
    """cotangent * phi'(s) / numel for each tensor."""
    check_kinds(scores, kinds, targets)
    grads = []
    for s, kind, target in zip(scores, kinds, targets, strict=True):
        wide = s.to(accumulation_dtype(s.dtype))
        if kind == ScoreLoss.IDENTITY:
            slope = torch.ones_like(wide)
        elif kind == ScoreLoss.NEGATIVE:
            slope = -torch.ones_like(wide)
        elif kind == ScoreLoss.SOFTPLUS:
            slope = wide.sigmoid()
        elif kind == ScoreLoss.SOFTPLUS_NEGATIVE:
            slope = -(-wide).sigmoid()
        elif kind == ScoreLoss.NEGATIVE_SOFTPLUS:
            slope = -wide.sigmoid()
        elif kind == ScoreLoss.HINGE:
            slope = torch.where(1 + wide <= 0, 0.0, torch.ones_like(wide))
        elif kind == ScoreLoss.HINGE_NEGATIVE:
            slope = torch.where(1 - wide <= 0, 0.0, -torch.ones_like(wide))
        else:
            slope = 2 * (wide - target)
        grads.append((cotangent * slope / s.numel()).to(s.dtype))
    return grads


def _score_loss_backward(
    cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]
) -> list[Tensor]:
    contiguous = [s.contiguous() for s in scores]
    return score_loss_backward_reference(cotangent, contiguous, kinds, targets)


def check_kinds(scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]) -> None:
    """ValueError unless there are scores, and a ``ScoreLoss`` and a target for each of them."""
    if not scores:
        raise ValueError("scores: expected at least one tensor, got none")
    for name, given in (("kinds", kinds), ("targets", targets)):
        if len(given) != len(scores):
            raise ValueError(f"{name}: expected one for each of {len(scores)} scores, got {len(given)}")
    if not _KINDS.issuperset(kinds):  # one call for all of them: this is in the way of small ops
        wrong = next(kind for kind in kinds if kind not in _KINDS)
        wanted = ", ".join(f"{kind.value} ({kind.name.lower()})" for kind in ScoreLoss)
        raise ValueError(f"kinds: expected {wanted}, got {wrong!r}")


score_loss_op = Op(
    "score_loss(Tensor[] scores, int[] kinds, float[] targets) -> Tensor",
    score_loss_reference,
    lambda scores, kinds, targets: new_wide(scores[0]),
    check_kinds,
)


score_loss_backward_op = Op(
    "score_loss_backward(Tensor cotangent, Tensor[] scores, int[] kinds, float[] targets) -> Tensor[]",
    _score_loss_backward,
    lambda cotangent, scores, kinds, targets: [s.new_empty(s.shape) for s in scores],
    lambda cotangent, scores, kinds, targets: check_kinds(scores, kinds, targets),
)


class _ScoreLoss(Differentiable):
    @staticmethod
    def forward(first: Tensor, second: Tensor | None, kinds: tuple[int, ...], targets: tuple[float, ...]) -> Any:
        return score_loss_op(_present(first, second), list(kinds), list(targets))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[2:]
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        first, second = ctx.saved_tensors
        grads = apply(_ScoreLossBackward, cotangent, first, second, *ctx.options)
        return grads[0], None if second is None else grads[1], None, None


class _ScoreLossBackward(Differentiable):
    @staticmethod
    def forward(
        cotangent: Tensor, first: Tensor, second: Tensor | None, kinds: tuple[int, ...], targets: tuple[float, ...]
    ) -> Any:
        return tuple(score_loss_backward_op(cotangent, _present(first, second), list(kinds), list(targets)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        cotangent, first, second = ctx.saved_tensors
        options = ctx.options
        grads = second_order(lambda *s: score_loss_reference(s, *options), _present(first, second), cotangent, tangents)
        return *grads, *[None] * (5 - len(grads))


def _present(first: Tensor, second: Tensor | None) -> list[Tensor]:
    return [first] if second is None else [first, second]


def _score_loss(kinds: tuple[ScoreLoss, ...], targets: tuple[float, ...], **scores: Tensor) -> Tensor:
    """The sum of mean phi(s) over one or two named score tensors, each with its kind of phi and its target."""
    tensors = list(scores.values())
    plain = NotImplemented if is_compiling() else score_loss_op.direct(tensors, kinds, targets)
    if plain is not NotImplemented:
        return plain
    for name, tensor in scores.items():
        check_scores(name, tensor)
        check_same_device(next(iter(scores)), tensors[0], name, tensor)
    first, *rest = promote(*tensors)
    loss: Tensor = apply(_ScoreLoss, first, rest[0] if rest else None, kinds, targets)
    return loss


def wgan_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean fake - mean real (Arjovsky et al. 2017, eq. 3, negated to be minimised).

    Scores: (N, *), batches may differ. Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss(
        (ScoreLoss.NEGATIVE, ScoreLoss.IDENTITY), (0.0, 0.0), real_scores=real_scores, fake_scores=fake_scores
    )


def wgan_generator_loss(fake_scores: Tensor) -> Tensor:
    """-mean fake. Scores: (N, *). Differentiable to any order. Raises TypeError or ValueError for bad input."""
    return _score_loss((ScoreLoss.NEGATIVE,), (0.0,), fake_scores=fake_scores)


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean max(0, 1 - real) + mean max(0, 1 + fake) (Lim & Ye 2017; Miyato et al. 2018, eq. 16).

    Scores: (N, *), batches may differ; at a kink the derivative is 0. Differentiable to any order. Raises TypeError or
    ValueError for bad input.
    """
    return _score_loss(
        (ScoreLoss.HINGE_NEGATIVE, ScoreLoss.HINGE), (0.0, 0.0), real_scores=real_scores, fake_scores=fake_scores
    )


def gan_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean softplus(-real) + mean softplus(fake), scores being logits (Goodfellow et al. 2014, eq. 1).

    Scores: (N, *), batches may differ. Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss(
        (ScoreLoss.SOFTPLUS_NEGATIVE, ScoreLoss.SOFTPLUS), (0.0, 0.0), real_scores=real_scores, fake_scores=fake_scores
    )


def saturating_generator_loss(fake_scores: Tensor) -> Tensor:
    """-mean softplus(fake), that is E log(1 - D), scores being logits (Goodfellow et al. 2014, eq. 1).

    Scores: (N, *). Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss((ScoreLoss.NEGATIVE_SOFTPLUS,), (0.0,), fake_scores=fake_scores)


def nonsaturating_generator_loss(fake_scores: Tensor) -> Tensor:
    """mean softplus(-fake), that is -E log D, scores being logits (Goodfellow et al. 2014, section 3).

    Scores: (N, *). Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss((ScoreLoss.SOFTPLUS_NEGATIVE,), (0.0,), fake_scores=fake_scores)


def least_squares_critic_loss(
    real_scores: Tensor, fake_scores: Tensor, *, real_target: float = 1.0, fake_target: float = 0.0
) -> Tensor:
    """mean (real - real_target)^2 + mean (fake - fake_target)^2 (Mao et al. 2017, eq. 2, without its halves).

    Scores: (N, *), batches may differ. Targets: any finite numbers; 1 and -1 are those of adversarial motion priors
    (Peng et al. 2021). Differentiable to any order in the scores. Raises TypeError or ValueError for bad input.
    """
    targets = check_finite("real_target", real_target), check_finite("fake_target", fake_target)
    kinds = ScoreLoss.LEAST_SQUARES, ScoreLoss.LEAST_SQUARES
    return _score_loss(kinds, targets, real_scores=real_scores, fake_scores=fake_scores)


def least_squares_generator_loss(fake_scores: Tensor, *, target: float = 1.0) -> Tensor:
    """mean (fake - target)^2 (Mao et al. 2017, eq. 2, without its half).

    Scores: (N, *). Target: any finite number. Differentiable to any order in the scores. Raises TypeError or ValueError
    for bad input.
    """
    return _score_loss((ScoreLoss.LEAST_SQUARES,), (check_finite("target", target),), fake_scores=fake_scores)
