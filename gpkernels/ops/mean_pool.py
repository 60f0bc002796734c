"""mean_pool: mean over windows that tile the last two axes, and its backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from gpkernels.ops.op import Op
from gpkernels.ops.tensors import memory_format


def mean_pool_reference(x: Tensor, h: int, w: int) -> Tensor:
    """Compute the means of h x w windows that tile the last two axes."""
    planes = x.reshape(-1, 1, *x.shape[-2:])
    return avg_pool2d(planes, (h, w)).reshape(*x.shape[:-2], x.shape[-2] // h, x.shape[-1] // w)


def mean_pool_backward_reference(cotangent: Tensor, h: int, w: int) -> Tensor:
    """Compute each window's cotangent, divided by h w, at all of its elements."""
    return (cotangent / (h * w)).repeat_interleave(h, -2).repeat_interleave(w, -1)


def _resized(x: Tensor, rows: int, cols: int) -> Tensor:
    layout = memory_format(x) if x.dim() == 4 else torch.contiguous_format
    return torch.empty((*x.shape[:-2], rows, cols), dtype=x.dtype, device=x.device, memory_format=layout)


mean_pool_op = Op(
    "mean_pool(Tensor x, int h, int w) -> Tensor",
    lambda x, h, w: mean_pool_reference(x, h, w).contiguous(memory_format=memory_format(x)),
    lambda x, h, w: _resized(x, x.shape[-2] // h, x.shape[-1] // w),
)


mean_pool_backward_op = Op(
    "mean_pool_backward(Tensor cotangent, int h, int w) -> Tensor",
    lambda c, h, w: mean_pool_backward_reference(c, h, w).contiguous(memory_format=memory_format(c)),
    lambda cotangent, h, w: _resized(cotangent, cotangent.shape[-2] * h, cotangent.shape[-1] * w),
)
