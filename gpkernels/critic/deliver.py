"""Gradients that were computed in the forward call, scaled in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Deliver(Function):
    """A value whose gradients are known: backward multiplies them by the cotangent."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Any:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this penalty holds its weight gradients and cannot be differentiated twice; call it inside "
                "gpkernels.fast_double_backward(), where it is made of PyTorch's own operations"
            )
        return None, None, *torch._foreach_mul(ctx.gradients, cotangent)


def deliver(value: Tensor, gradients: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The value, with a known gradient for each given tensor."""
    if not gradients:
        return value
    delivered: Tensor = _Deliver.apply(value, [g for _, g in gradients], *(x for x, _ in gradients))
    return delivered
