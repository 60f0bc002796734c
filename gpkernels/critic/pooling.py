"""Max pooling: the winners' places are kept; going back scatters to them, going forth gathers from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


DIMS: dict[Any, int] = {
    F.max_pool1d: 1,
    F.max_pool2d: 2,
    F.max_pool3d: 3,
    F.adaptive_max_pool1d: 1,
    F.adaptive_max_pool2d: 2,
    F.adaptive_max_pool3d: 3,
}
RULES: dict[Any, Callable[..., Tensor]] = {f: max_pooling(f, dims) for f, dims in DIMS.items()}
