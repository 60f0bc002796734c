"""gradient_norm_penalty: mean (|g_n| - target)^2 over an input gradient (Gulrajani et al. 2017, eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.ops.checks import check_batch, check_nonnegative
from gpkernels.ops.differentiable import Differentiable, apply, second_order
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import laid_out, memory_format, new_like, new_wide, per_row, rows_of

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_REDUCTION_CODES = frozenset(REDUCTIONS.values())


def gradient_norm_penalty_reference(
    grad: Tensor, target: float, one_sided: bool, reduction: int
) -> tuple[Tensor, Tensor]:
    """((|g_n| - target)^2 reduced over n, coefficient): the coefficient c_n gives the derivative w_n c_n g_n.

    One-sided: max(0, |g_n| - target)^2. Where |g_n| = 0 the subgradient 0 is taken; target = 0 is the smooth |g_n|^2.
    """
    rows = rows_of(grad)
    squared = (rows * rows).sum(1)
    if target == 0:
        coefficient = torch.full_like(squared, 2.0)
        values = squared
    else:
        zero = squared == 0
        norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
        excess = norm - target
        if one_sided:
            excess = torch.where(excess <= 0, 0.0, excess)
        coefficient = torch.where(zero, 0.0, 2.0 * excess / torch.where(zero, 1.0, norm))
        values = excess * excess
    if reduction == REDUCTIONS["mean"]:
        coefficient = coefficient / grad.shape[0]
    return _reduce(values, reduction), coefficient.detach()


def _reduce(values: Tensor, reduction: int) -> Tensor:
    if reduction == REDUCTIONS["mean"]:
        return values.mean()
    return values.sum() if reduction == REDUCTIONS["sum"] else values


def gradient_norm_penalty_backward_reference(cotangent: Tensor, grad: Tensor, coefficient: Tensor) -> Tensor:
    """cotangent * coefficient_n * g_n: a scaled copy. The cotangent is one number, or one per row."""
    return (per_row(cotangent * coefficient, grad) * grad).to(grad.dtype)


def check_reduction(reduction: str) -> int:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return REDUCTIONS[reduction]


def _check_reduction_code(grad: Tensor, target: float, one_sided: bool, reduction: int) -> None:
    if reduction not in _REDUCTION_CODES:
        wanted = ", ".join(f"{code} ({called})" for called, code in REDUCTIONS.items())
        raise ValueError(f"reduction: expected {wanted}, got {reduction!r}")


def _gradient_norm_penalty_backward(cotangent: Tensor, grad: Tensor, coefficient: Tensor) -> Tensor:
    scaled = gradient_norm_penalty_backward_reference(cotangent, laid_out(grad)[0], coefficient)
    return scaled.contiguous(memory_format=memory_format(grad))


gradient_norm_penalty_op = Op(
    "gradient_norm_penalty(Tensor grad, float target, bool one_sided, int reduction) -> (Tensor, Tensor)",
    gradient_norm_penalty_reference,
    lambda grad, target, one_sided, reduction: (
        new_wide(grad, *([grad.shape[0]] if reduction == REDUCTIONS["none"] else [])),
        new_wide(grad, grad.shape[0]),
    ),
    _check_reduction_code,
)


gradient_norm_penalty_backward_op = Op(
    "gradient_norm_penalty_backward(Tensor cotangent, Tensor grad, Tensor coefficient) -> Tensor",
    _gradient_norm_penalty_backward,
    lambda cotangent, grad, coefficient: new_like(grad),
)


class _GradientNormPenalty(Differentiable):
    @staticmethod
    def forward(grad: Tensor, target: float, one_sided: bool, reduction: int) -> Any:
        return gradient_norm_penalty_op(grad, target, one_sided, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> Any:
        return apply(_GradientNormPenaltyBackward, cotangent, *ctx.saved_tensors, *ctx.options), None, None, None


class _GradientNormPenaltyBackward(Differentiable):
    @staticmethod
    def forward(
        cotangent: Tensor, grad: Tensor, coefficient: Tensor, target: float, one_sided: bool, reduction: int
    ) -> Any:
        return gradient_norm_penalty_backward_op(cotangent, grad, coefficient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        cotangent, grad = ctx.saved_tensors
        options = ctx.options
        to_cotangent, to_grad = second_order(
            lambda g: gradient_norm_penalty_reference(g, *options)[0], (grad,), cotangent, (tangent,)
        )
        return to_cotangent, to_grad, None, None, None, None


def gradient_norm_penalty(
    grad: Tensor, target: float = 1.0, *, one_sided: bool = False, reduction: str = "mean"
) -> Tensor:
    """Mean (|g_n| - target)^2 over an input gradient (Gulrajani et al. 2017, eq. 3).

    grad: (N, *), |.| over all but the first axis. one_sided: max(0, |g_n| - target)^2 instead. reduction: "mean", "sum"
    or "none", which gives (N,). target = 0 is the zero-centred penalty |g_n|^2. Where |g_n| = 0 the subgradient is 0.
    Differentiable to any order in grad. Raises TypeError or ValueError for bad input.
    """
    options = check_nonnegative("target", target), bool(one_sided), check_reduction(reduction)
    plain = NotImplemented if is_compiling() else gradient_norm_penalty_op.direct(grad, *options)
    if plain is not NotImplemented:
        return plain[0]
    check_batch("grad", grad)
    penalty: Tensor = apply(_GradientNormPenalty, grad, *options)[0]
    return penalty
