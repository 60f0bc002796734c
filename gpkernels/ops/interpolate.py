"""interpolate: eps * real + (1 - eps) * fake, one eps per sample (Gulrajani et al. 2017, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.ops.checks import check_eps, check_generator, check_pair
from gpkernels.ops.differentiable import Differentiable, apply
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import accumulation_dtype, laid_out, memory_format, new_like, per_row, promote


def interpolate_reference(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """Compute eps * real + (1 - eps) * fake, one eps per sample (Gulrajani et al. 2017, Algorithm 1)."""
    weight = per_row(eps, real).to(accumulation_dtype(real.dtype))
    return (weight * real + (1 - weight) * fake).to(real.dtype)


def interpolate_backward_reference(
    cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool
) -> tuple[Tensor, Tensor]:
    """Compute (eps * cotangent, (1 - eps) * cotangent); empty for a side that is not requested."""
    weight = per_row(eps, cotangent).to(accumulation_dtype(cotangent.dtype))
    nothing = cotangent.new_empty(0)
    return (
        (weight * cotangent).to(cotangent.dtype) if to_real else nothing,
        ((1 - weight) * cotangent).to(cotangent.dtype) if to_fake else nothing,
    )


def _interpolate(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    layout, (real, fake) = memory_format(real, fake), laid_out(real, fake)
    return interpolate_reference(real, fake, eps).contiguous(memory_format=layout)


def _interpolate_backward(cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool) -> tuple[Tensor, Tensor]:
    layout, (cotangent,) = memory_format(cotangent), laid_out(cotangent)
    to = interpolate_backward_reference(cotangent, eps, to_real, to_fake)
    wanted = (to_real, to_fake)
    first, second = (g.contiguous(memory_format=layout) if w else g for g, w in zip(to, wanted, strict=True))
    return first, second


interpolate_op = Op(
    "interpolate(Tensor real, Tensor fake, Tensor eps) -> Tensor",
    _interpolate,
    lambda real, fake, eps: new_like(real, fake),
)


interpolate_backward_op = Op(
    "interpolate_backward(Tensor cotangent, Tensor eps, bool to_real, bool to_fake) -> (Tensor, Tensor)",
    _interpolate_backward,
    lambda cotangent, eps, to_real, to_fake: (
        new_like(cotangent) if to_real else cotangent.new_empty(0),
        new_like(cotangent) if to_fake else cotangent.new_empty(0),
    ),
)


class _Interpolate(Differentiable):
    @staticmethod
    def forward(real: Tensor, fake: Tensor, eps: Tensor) -> Any:
        return interpolate_op(real, fake, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        to_real, to_fake = ctx.needs_input_grad[:2]
        real, fake = apply(_InterpolateBackward, cotangent, ctx.saved_tensors[0], to_real, to_fake)
        return real if to_real else None, fake if to_fake else None, None


class _InterpolateBackward(Differentiable):
    @staticmethod
    def forward(cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool) -> Any:
        return interpolate_backward_op(cotangent, eps, to_real, to_fake)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.sides = inputs[2], inputs[3]

    @staticmethod
    def backward(ctx: Any, real: Tensor, fake: Tensor) -> Any:
        (eps,) = ctx.saved_tensors
        if all(ctx.sides):
            return apply(_Interpolate, real, fake, eps), None, None, None
        side = 0 if ctx.sides[0] else 1
        return apply(_InterpolateBackward, (real, fake)[side], eps, *ctx.sides)[side], None, None, None


interpolate_op.differentiate(
    _Interpolate, interpolate_backward_op, ("cotangent", "eps", ("real", "real"), ("fake", "fake")), differentiable=2
)


def draw_eps(real: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one eps per sample from U[0, 1), as ``torch.rand(N, 1, ..., 1)`` does in the dtype of real.

    float32 for float16 and bfloat16, as in hand-written code that gives no dtype.
    """
    shape = (*real.shape[:1], *[1] * (real.dim() - 1))
    dtype = accumulation_dtype(real.dtype)
    if generator is None:  # a separate overload: the other one does not accept symbolic sizes
        return torch.rand(shape, dtype=dtype, device=real.device)
    check_generator(generator, real.device)
    return torch.rand(shape, dtype=dtype, device=real.device, generator=generator)


def interpolate(
    real: Tensor, fake: Tensor, eps: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    r"""Interpolate between real and fake samples, at random points of the lines that join them.

    .. math::
        \hat{x}_n = \epsilon_n \, \text{real}_n + (1 - \epsilon_n) \, \text{fake}_n

    The points at which WGAN-GP penalises the gradient. Differentiable to any order in every tensor, in reverse
    and forward mode.

    Args:
        real (Tensor): real samples.
        fake (Tensor): generated samples, of the same shape and on the same device.
        eps (Tensor, optional): one weight per sample. Default: drawn from U[0, 1) as ``torch.rand(N, 1, ..., 1)`` draws
            it, so that a seed gives the same points as hand-written code.
        generator (torch.Generator, optional): generator of ``eps``. Default: PyTorch's global generator of the device.

    Shape:
        - real, fake: :math:`(N, *)`
        - eps: :math:`(N)` or :math:`(N, 1, \ldots, 1)`
        - Output: :math:`(N, *)`

    Returns:
        Tensor: the points, in the promoted dtype of ``real`` and ``fake``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or ``generator`` is not a ``torch.Generator``.
        ValueError: shapes or devices differ, the batch is empty, or ``eps`` is not one number per sample.

    Example:
        >>> real, fake = torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
        >>> gpkernels.interpolate(real, fake).shape
        torch.Size([64, 3, 32, 32])

    References:
        Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, Algorithm 1. https://arxiv.org/abs/1704.00028
    """
    drawn = eps is None
    if eps is None:
        check_pair("real", real, "fake", fake)
        eps = draw_eps(real, generator)
    if not is_compiling():
        mixed = interpolate_op.recorded(real, fake, eps)
        if mixed is not NotImplemented:
            return mixed
    if not drawn:
        check_pair("real", real, "fake", fake)
        check_eps(eps, real)
    real, fake = promote(real, fake)
    if torch.is_grad_enabled() and eps.requires_grad:  # rare, so left to PyTorch
        return interpolate_reference(real, fake, eps)
    mixed = apply(_Interpolate, real, fake, eps)
    return mixed
