"""Calls that give the same for less, where a call costs more than its arithmetic.

PyTorch gives nearly every convolution on a CPU to oneDNN. For images as small as those that penalties are tried out on
this takes two to four times as long as PyTorch's own loop over the samples, as weights are laid out anew in every call;
and for the few channels of an image its gradient of the input takes as much longer whatever the size. A batch of
products with an expanded tensor, such as the gradient of a mean over tokens, is made matrix by matrix, each copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from gpkernels.private import small_convolution, small_convolution_backward

aten = torch.ops.aten
MOST_FLOPS, MOST_SAMPLES = 1 << 21, 8  # above, oneDNN is as fast
FEW_CHANNELS = 4


def cheaper(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Another way to make a call of ATen, if there is one for such arguments."""
    make = _OTHERS.get(func)
    return None if make is None or kwargs else make(*args)


def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Callable[[], Tensor] | None:
    if not (_fits(x, w, geometry) and _is_small(x, w, geometry)):
        return None

    def call() -> Tensor:
        planes, kernels, *sides = _in_planes([x, w], geometry)
        y: Tensor = small_convolution(planes, kernels, list(kernels.shape[2:]), bias, *sides)
        return y if x.dim() == 4 else y.squeeze(2)

    return call


def _convolution_backward(
    c: Tensor, x: Tensor, w: Tensor, bias: Sequence[int] | None, *more: Any
) -> Callable[[], list[Tensor | None]] | None:
    *geometry, mask = more
    of_few = x.shape[1] <= FEW_CHANNELS and mask == [True, False, False]
    if not (_fits(x, w, geometry) and (of_few or _is_small(x, w, geometry))):
        return None

    def call() -> list[Tensor | None]:
        *tensors, kernels, stride, padding = _in_planes([c.contiguous(), x, w], geometry)
        found = small_convolution_backward(*tensors, kernels, list(kernels.shape[2:]), stride, padding, mask)
        return [u if u is None or x.dim() == 4 or u.dim() == 1 else u.squeeze(2) for u in found]

    return call


def _fits(x: Tensor, w: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether oneDNN would be asked, and the loop can do it, which is for one layout."""
    _, _, dilation, transposed, _, groups = geometry
    plain = x.device.type == "cpu" and x.dtype == w.dtype == torch.float32 and x.dim() in (3, 4) and x.numel() > 0
    spread = prod(w.shape[2:]) > 1 and not transposed and groups == 1 and prod(dilation) == 1
    return plain and spread and x.is_contiguous() and w.is_contiguous()


def _is_small(x: Tensor, w: Tensor, geometry: Sequence[Any]) -> bool:
    sides = zip(x.shape[2:], w.shape[2:], geometry[0], geometry[1], strict=True)
    places = prod((n + 2 * padding - k) // stride + 1 for n, k, stride, padding in sides)
    return x.shape[0] <= MOST_SAMPLES and 2 * x.shape[0] * w.numel() * places <= MOST_FLOPS


def _in_planes(tensors: Sequence[Tensor], geometry: Sequence[Any]) -> list[Any]:
    """The tensors, stride and padding in two dimensions."""
    stride, padding, *_ = geometry
    if len(stride) == 2:
        return [*tensors, stride, padding]
    return [*(x.unsqueeze(2) for x in tensors), [1, *stride], [0, *padding]]


def _products(a: Tensor, b: Tensor) -> Callable[[], Tensor] | None:
    if not (a.device.type == "cpu" and (_is_expanded(a) or _is_expanded(b))):
        return None
    return lambda: aten.bmm(*[x.contiguous() if _is_expanded(x) else x for x in (a, b)])


def _is_expanded(x: Tensor) -> bool:
    """Whether rows or columns of matrices are one in memory."""
    return any(n > 1 and stride == 0 for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


_OTHERS: dict[Any, Callable[..., Any]] = {
    aten.bmm.default: _products,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
