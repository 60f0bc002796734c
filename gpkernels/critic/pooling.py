"""Pooling.

Max: the winners' places are kept; going back scatters to them, going forth gathers from them. Mean over windows that
tile the image, as critics have it: an op of its own, as PyTorch's general one is slow. Any other mean is one of
``structure``'s linear maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels import ops
from gpkernels.critic.structure import linear_map
from gpkernels.critic.tape import Node, NoRule, Tape


class MaxPool(Node):
    """``places`` are flat positions in the last ``dims`` axes of the input."""

    def __init__(self, shape: torch.Size, places: Tensor, dims: int) -> None:
        self.shape, self.places, self.dims = shape[1:], places, dims

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (scattered(cotangent, self.places[rows], self.shape, self.dims),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else gathered(t, self.places[rows], self.dims)


def scattered(cotangent: Tensor, places: Tensor, shape: Sequence[int], dims: int) -> Tensor:
    """The transpose of ``gathered``: each cotangent added at its winner's place, (N, *shape)."""
    out = cotangent.new_zeros(cotangent.shape[0], *shape)
    out.flatten(-dims).scatter_add_(-1, places.flatten(-dims), cotangent.flatten(-dims))
    return out


def gathered(t: Tensor, places: Tensor, dims: int) -> Tensor:
    """The values at the winners' places."""
    return t.flatten(-dims).gather(-1, places.flatten(-dims)).reshape(places.shape)


def pooled(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A max pooling function's values and places."""
    output, places = function(*args, **{**kwargs, "return_indices": True})
    return output, places


def max_pooling(function: Callable[..., Any], dims: int) -> Callable[..., Tensor]:
    def record(tape: Tape, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("return_indices") or input.dim() != dims + 2:
            raise NoRule("max pooling that returns its indices, or without a batch axis")
        output, places = pooled(function, (input, *args), kwargs)
        return tape.add(MaxPool(input.shape, places, dims), (input,), output)

    return record


class MeanPool(Node):
    def __init__(self, h: int, w: int) -> None:
        self.h, self.w = h, w

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (ops.mean_pool_backward(cotangent, self.h, self.w),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else ops.mean_pool(t, self.h, self.w)


_any_mean = linear_map(F.avg_pool2d)


def record_mean_pool(
    tape: Tape,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    h, w = kernel_size if isinstance(kernel_size, (tuple, list)) and len(kernel_size) == 2 else (kernel_size,) * 2
    tiles = stride in (None, [], kernel_size, (h, w)) and padding in (0, (0, 0)) and divisor_override is None
    tiles &= type(h) is int and type(w) is int and input.dim() == 4
    if tiles and input.shape[2] % h == 0 and input.shape[3] % w == 0:
        return tape.add(MeanPool(h, w), (input,), ops.mean_pool(input, h, w))
    rest = (stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _any_mean(tape, input, kernel_size, *rest)


DIMS: dict[Any, int] = {
    F.max_pool1d: 1,
    F.max_pool2d: 2,
    F.max_pool3d: 3,
    F.adaptive_max_pool1d: 1,
    F.adaptive_max_pool2d: 2,
    F.adaptive_max_pool3d: 3,
}
RULES: dict[Any, Callable[..., Tensor]] = {
    **{f: max_pooling(f, dims) for f, dims in DIMS.items()},
    F.avg_pool2d: record_mean_pool,
}
