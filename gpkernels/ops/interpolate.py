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
    """eps * real + (1 - eps) * fake, eps one per sample (Gulrajani et al. 2017, Algorithm 1)."""
    weight = per_row(eps, real).to(accumulation_dtype(real.dtype))
    return (weight * real + (1 - weight) * fake).to(real.dtype)


def interpolate_backward_reference(
    cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool
) -> tuple[Tensor, Tensor]:
    """(eps * cotangent, (1 - eps) * cotangent); an empty tensor for a side that is not wanted."""
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


def draw_eps(real: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One eps per sample from U[0, 1), as ``torch.rand(N, 1, ..., 1)`` draws it in the dtype of real.

    For float16 and bfloat16 in float32, in which hand-written code draws it too unless it is told otherwise.
    """
    shape = (*real.shape[:1], *[1] * (real.dim() - 1))
    dtype = accumulation_dtype(real.dtype)
    if generator is None:  # an overload of its own: the other one takes no size that the compiler leaves open
        return torch.rand(shape, dtype=dtype, device=real.device)
    check_generator(generator, real.device)
    return torch.rand(shape, dtype=dtype, device=real.device, generator=generator)


def interpolate(
    real: Tensor, fake: Tensor, eps: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """eps * real + (1 - eps) * fake, the points where WGAN-GP penalises (Gulrajani et al. 2017, Algorithm 1).

    real, fake: (N, *), one shape. eps: (N,) or (N, 1, ..., 1), one per sample; if None it is drawn as
    ``torch.rand(N, 1, ..., 1)`` draws it, by ``generator`` if given. Returns (N, *) in the promoted dtype of real and
    fake. Differentiable to any order in every tensor. Raises TypeError or ValueError for bad input.
    """
    if eps is not None and not is_compiling():
        mixed = interpolate_op.direct(real, fake, eps)
        if mixed is not NotImplemented:
            return mixed
    check_pair("real", real, "fake", fake)
    if eps is None:
        eps = draw_eps(real, generator)
    else:
        check_eps(eps, real)
    real, fake = promote(real, fake)
    if torch.is_grad_enabled() and eps.requires_grad:  # rare enough to leave to PyTorch
        return interpolate_reference(real, fake, eps)
    mixed = apply(_Interpolate, real, fake, eps)
    return mixed
