"""Gradients that were computed in the forward call, scaled in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.private import dispatch_mode, foreach_mul, foreach_mul_, graph_is_kept, is_batched, is_legacy_batched


class _Deliver(Function):
    """A value whose gradients are known: backward multiplies them by the cotangent, in place if they are done with.

    csrc/deliver.cpp is the same as a node in C++, for plain tensors that nothing watches.
    """

    @staticmethod
    def forward(ctx: Any, value: list[Tensor], gradients: list[Tensor], *tensors: Tensor) -> Any:
        ctx.gradients = gradients
        return value[0]  # in a list: a tensor would be an argument, and be given back as a view of itself

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this penalty holds its weight gradients and cannot be differentiated twice; call it inside "
                "gpkernels.fast_double_backward(), where it is made of PyTorch's own operations"
            )
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("backward through this penalty a second time: the first needs retain_graph=True")
        kept = graph_is_kept() or not isinstance(
            ctx, BackwardCFunction
        )  # compiled autograd's stand-in: the node keeps them
        if not kept:
            ctx.gradients = None
        if is_batched(cotangent) or is_legacy_batched(cotangent):  # lists have no rule for it
            return None, None, *(g * cotangent for g in gradients)
        if kept:
            return None, None, *foreach_mul(gradients, cotangent)
        if not _is_one(cotangent):
            foreach_mul_(gradients, cotangent)
        return None, None, *gradients


def _is_one(cotangent: Tensor) -> bool:
    """Whether there is nothing to scale, where looking costs nothing and nobody writes calls down."""
    plain = type(cotangent) is Tensor and cotangent.device.type == "cpu" and dispatch_mode() is None
    return plain and cotangent.item() == 1.0


def deliver(value: Tensor, gradients: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The value, with a known gradient for each given tensor."""
    if not gradients:
        return value
    known, tensors = [g for _, g in gradients], [x for x, _ in gradients]
    delivered: Tensor = NotImplemented if is_compiling() else backends.deliver(value, known, tensors)
    return _Deliver.apply([value], known, *tensors) if delivered is NotImplemented else delivered
