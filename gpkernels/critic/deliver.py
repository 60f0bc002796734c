"""Gradients that are computed in forward and scaled by the cotangent in backward."""

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

TWICE = (
    "this penalty has precomputed weight gradients and cannot be differentiated twice; call it inside "
    "gpkernels.fast_double_backward(), where it is composed of PyTorch's own operations"
)


class _Deliver(Function):
    """A value with precomputed gradients, which backward multiplies by the cotangent, in place unless retained.

    csrc/deliver.cpp is the same as a C++ node, for plain tensors without modes or subclasses.
    """

    @staticmethod
    def forward(ctx: Any, value: list[Tensor], gradients: list[Tensor], *tensors: Tensor) -> Any:
        ctx.gradients = gradients
        return value[0]  # passed in a list: a tensor argument would be returned as a view of itself

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("backward through this penalty a second time: expected retain_graph=True in the first")
        kept = graph_is_kept() or not isinstance(
            ctx, BackwardCFunction
        )  # compiled autograd's proxy: the node keeps them
        if not kept:
            ctx.gradients = None
        if is_batched(cotangent) or is_legacy_batched(cotangent):  # foreach has no batching rule
            return None, None, *(g * cotangent for g in gradients)
        if kept:
            return None, None, *foreach_mul(gradients, cotangent)
        if not _is_one(cotangent):
            foreach_mul_(gradients, cotangent)
        return None, None, *gradients


def _is_one(cotangent: Tensor) -> bool:
    """Whether the cotangent is 1, if reading it does not synchronise and no mode records calls."""
    plain = type(cotangent) is Tensor and cotangent.device.type == "cpu" and dispatch_mode() is None
    return plain and cotangent.item() == 1.0


def deliver(value: Tensor, gradients: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attach a precomputed gradient for each given tensor to the value."""
    if not gradients:
        return value
    known, tensors = [g for _, g in gradients], [x for x, _ in gradients]
    delivered: Tensor = NotImplemented if is_compiling() else backends.deliver(value, known, tensors)
    return _Deliver.apply([value], known, *tensors) if delivered is NotImplemented else delivered
