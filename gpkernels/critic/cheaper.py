"""Calls that give the same for less, where a call costs more than its arithmetic.

PyTorch gives nearly every convolution on a CPU to oneDNN, which takes several times as long as PyTorch's own loop over
samples for images as small as those that penalties are tried out on: it looks up a primitive and orders weights anew.
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
NARROW = 4  # input channels: for so few oneDNN's gradient of the input is slow, whatever the size


def cheaper(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Another way to make a call of ATen, if there is one for such arguments."""
    make = _OTHERS.get(func)
    return None if make is None or kwargs else make(*args)


def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Callable[[], Tensor] | None:
    stride, padding, *rest = geometry
    if not _is_small(x, w, stride, padding, rest):
        return None
    call = lambda x, w, *sides: small_convolution(x, w, list(w.shape[2:]), bias, *sides)  # noqa: E731
    if x.dim() == 4:
        return lambda: call(x, w, stride, padding)
    return lambda: call(x.unsqueeze(2), w.unsqueeze(2), [1, *stride], [0, *padding]).squeeze(2)


def _convolution_backward(
    c: Tensor, x: Tensor, w: Tensor, bias: Sequence[int] | None, *more: Any
) -> Callable[[], list[Tensor | None]] | None:
    *geometry, mask = more
    stride, padding, *rest = geometry
    narrow = x.shape[1] <= NARROW and mask == [True, False, False]
    if not _is_small(x, w, stride, padding, rest, narrow):
        return None
    call = (
        lambda c, x, w, *sides: small_convolution_backward(  # noqa: E731
            c.contiguous(), x, w, list(w.shape[2:]), *sides, mask
        )
    )
    if x.dim() == 4:
        return lambda: call(c, x, w, stride, padding)
    lifted = lambda: call(*(u.unsqueeze(2) for u in (c, x, w)), [1, *stride], [0, *padding])  # noqa: E731
    return lambda: [u if u is None or u.dim() < 4 else u.squeeze(2) for u in lifted()]


def _is_small(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], rest: Sequence[Any], narrow: bool = False
) -> bool:
    """Whether oneDNN would be asked, and should not be. narrow: as it takes long whatever the size."""
    dilation, transposed, _, groups = rest
    if x.device.type != "cpu" or not x.dtype == w.dtype == torch.float32 or x.dim() not in (3, 4) or not x.numel():
        return False
    if transposed or groups != 1 or prod(dilation) != 1 or prod(w.shape[2:]) == 1:
        return False
    if not (x.is_contiguous() and w.is_contiguous()):  # that loop is for one layout alone
        return False
    if narrow or x.shape[0] > MOST_SAMPLES:
        return narrow
    sides = zip(x.shape[2:], w.shape[2:], stride, padding, strict=True)
    return 2 * x.shape[0] * w.numel() * prod((n + 2 * p - k) // s + 1 for n, k, s, p in sides) <= MOST_FLOPS


_OTHERS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
