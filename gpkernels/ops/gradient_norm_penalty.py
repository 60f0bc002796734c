"""gradient_norm_penalty: mean ||g_n| - target|^power over an input gradient (Gulrajani et al. 2017, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.ops.checks import (
    check_batch,
    check_finite,
    check_flag,
    check_floating,
    check_nonnegative,
    check_pack,
    check_whole,
)
from gpkernels.ops.differentiable import Differentiable, apply, second_order
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import laid_out, memory_format, new_like, new_wide, per_row, rows_of

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_REDUCTION_CODES = frozenset(REDUCTIONS.values())


def gradient_norm_penalty_reference(
    grad: Tensor, target: float, one_sided: bool, reduction: int, power: float
) -> tuple[Tensor, Tensor]:
    """Compute (||g_n| - target|^power reduced over n, coefficient); the derivative is w_n coefficient_n g_n.

    One-sided: max(0, |g_n| - target)^power. Where |g_n| = 0 the subgradient 0 is taken, and where |g_n| = target; a
    target of 0 with a power of 2 is the smooth |g_n|^2.
    """
    rows = rows_of(grad)
    squared = (rows * rows).sum(1)
    if target == 0 and power == 2:
        coefficient = torch.full_like(squared, 2.0)
        values = squared
    else:
        zero = squared == 0
        norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
        excess = norm - target
        if one_sided:
            excess = torch.where(excess <= 0, 0.0, excess)
        values, slope = _power(excess, power)
        coefficient = torch.where(zero, 0.0, slope / torch.where(zero, 1.0, norm))
    if reduction == REDUCTIONS["mean"]:
        coefficient = coefficient / grad.shape[0]
    return _reduce(values, reduction), coefficient.detach()


def _power(x: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Return |x|^power and its slope. At x = 0 a derivative is 0 unless the power gives it another value."""
    if power == 2:
        return x * x, 2.0 * x
    size = x.abs()
    if power == 1:
        return size, x.sign()
    zero = size == 0
    some = torch.where(zero, 1.0, size)
    return torch.where(zero, 0.0, some**power), torch.where(zero, 0.0, power * some ** (power - 1) * x.sign())


def _reduce(values: Tensor, reduction: int) -> Tensor:
    if reduction == REDUCTIONS["mean"]:
        return values.mean()
    return values.sum() if reduction == REDUCTIONS["sum"] else values


def gradient_norm_penalty_backward_reference(cotangent: Tensor, grad: Tensor, coefficient: Tensor) -> Tensor:
    """Return cotangent * coefficient_n * g_n, a scaled copy. The cotangent is one number, or one per row."""
    return (per_row(cotangent * coefficient, grad) * grad).to(grad.dtype)


def check_reduction(reduction: str) -> int:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return REDUCTIONS[reduction]


def _check_reduction_code(grad: Tensor, target: float, one_sided: bool, reduction: int, power: float) -> None:
    if reduction not in _REDUCTION_CODES:
        wanted = ", ".join(f"{code} ({called})" for called, code in REDUCTIONS.items())
        raise ValueError(f"reduction: expected {wanted}, got {reduction!r}")


def _gradient_norm_penalty_backward(cotangent: Tensor, grad: Tensor, coefficient: Tensor) -> Tensor:
    scaled = gradient_norm_penalty_backward_reference(cotangent, laid_out(grad)[0], coefficient)
    return scaled.contiguous(memory_format=memory_format(grad))


gradient_norm_penalty_op = Op(
    "gradient_norm_penalty(Tensor grad, float target, bool one_sided, int reduction, float power) -> (Tensor, Tensor)",
    gradient_norm_penalty_reference,
    lambda grad, target, one_sided, reduction, power: (
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
    def forward(grad: Tensor, target: float, one_sided: bool, reduction: int, power: float) -> Any:
        return gradient_norm_penalty_op(grad, target, one_sided, reduction, power)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> Any:
        grad = apply(_GradientNormPenaltyBackward, cotangent, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, None


class _GradientNormPenaltyBackward(Differentiable):
    @staticmethod
    def forward(
        cotangent: Tensor,
        grad: Tensor,
        coefficient: Tensor,
        target: float,
        one_sided: bool,
        reduction: int,
        power: float,
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
        return to_cotangent, to_grad, None, None, None, None, None


gradient_norm_penalty_op.differentiate(
    _GradientNormPenalty, gradient_norm_penalty_backward_op, ("cotangent", "grad", 1), differentiable=1
)


def gradient_norm_penalty(
    grad: Tensor,
    target: float = 1.0,
    *,
    one_sided: bool = False,
    reduction: str = "mean",
    power: float = 2.0,
    dim: int | Sequence[int] | None = None,
    pack: int = 1,
) -> Tensor:
    r"""Compute the penalty on the norms of an input gradient.

    .. math::
        \frac{1}{N} \sum_n \bigl| \lVert g_n \rVert_2 - \text{target} \bigr|^{\text{power}}

    A ``target`` of 0 gives the zero-centred penalty. Where :math:`g_n = 0` the subgradient is 0, and for a power of 1
    also where :math:`\lVert g_n \rVert_2 = \text{target}`. Differentiable to any order in ``grad``; results and sums
    are in at least float32.

    Args:
        grad (Tensor): the input gradient.
        target (float): norm that is not penalised, finite and at least 0. Default: 1.
        one_sided (bool): penalise :math:`\max(0, \lVert g_n \rVert_2 - \text{target})` instead. Default: False.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, which gives one value per norm. Default: ``"mean"``.
        power (float): exponent, finite and at least 1. Default: 2.
        dim (int or Sequence[int], optional): axes that a norm is over. Default: all but the first.
        pack (int): number of consecutive samples that have one norm; divides :math:`N`, and is 1 where ``dim`` is
            given. Default: 1.

    Shape:
        - grad: :math:`(N, *)`
        - Output: scalar; for ``reduction="none"`` :math:`(N / \text{pack})`, or the axes that are not in ``dim``

    Returns:
        Tensor: the penalty, in at least float32.

    Raises:
        TypeError: ``grad`` is not a dense floating-point tensor, or an option is of another type.
        ValueError: the batch is empty, or an option is out of its range.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> x = torch.randn(64, 2, requires_grad=True)
        >>> (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        >>> gpkernels.gradient_norm_penalty(grad).backward()

    References:
        Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, eq. 3. https://arxiv.org/abs/1704.00028

        Lin et al., "PacGAN: The power of two samples in generative adversarial networks", 2018, section 3.
        https://arxiv.org/abs/1712.04086
    """
    options = (
        check_nonnegative("target", target),
        check_flag("one_sided", one_sided),
        check_reduction(reduction),
        check_power(power),
    )
    if dim is not None or type(pack) is not int or pack != 1:
        return _of_other_rows(grad, options, dim, pack)
    plain = NotImplemented if is_compiling() else gradient_norm_penalty_op.recorded(grad, *options)
    if plain is not NotImplemented:
        return plain[0]
    check_batch("grad", grad)
    penalty: Tensor = apply(_GradientNormPenalty, grad, *options)[0]
    return penalty


def check_power(power: object) -> float:
    power = check_finite("power", power)
    if power < 1:
        raise ValueError(f"power: expected a number of at least 1, got {power}")
    return power


def _of_other_rows(
    grad: Tensor, options: tuple[float, bool, int, float], dim: int | Sequence[int] | None, pack: int
) -> Tensor:
    """Compute the penalty where a row is not a sample."""
    if dim is None:
        check_batch("grad", grad)
        shape = [grad.shape[0] // check_pack("grad", grad, pack)]
        if memory_format(grad) != torch.contiguous_format:
            grad = grad.movedim(1, -1)  # its memory order; a norm does not depend on the order
    else:
        if check_whole("pack", pack) != 1:
            raise ValueError(f"pack: expected 1 where dim is given, got {pack}")
        check_floating("grad", grad)
        axes = _check_axes(dim, grad.dim())
        others = [axis for axis in range(grad.dim()) if axis not in axes]
        shape = [grad.shape[axis] for axis in others]
        if 0 in shape:
            raise ValueError(f"grad: expected at least one row, got shape {tuple(grad.shape)}, norms over {axes}")
        grad = grad if others == [0] else grad.permute(*others, *axes)
    rows = math.prod(shape)
    penalty: Tensor = apply(_GradientNormPenalty, grad.reshape(rows, grad.numel() // rows), *options)[0]
    return penalty.reshape(shape) if options[2] == REDUCTIONS["none"] else penalty


def _check_axes(dim: int | Sequence[int], dims: int) -> list[int]:
    """Return the axes, counted from the first; raise unless they are some of them, each once."""
    given = dim if isinstance(dim, (tuple, list)) else [dim]
    axes = [check_whole("dim", axis) for axis in given]
    wanted = f"one or several of {dims} axes, each once and not all of them"
    if not all(-dims <= axis < dims for axis in axes):
        raise ValueError(f"dim: expected {wanted}, got {dim}")
    axes = [axis % dims for axis in axes]
    if len(set(axes)) != len(axes) or not 0 < len(axes) < dims:
        raise ValueError(f"dim: expected {wanted}, got {dim}")
    return axes
