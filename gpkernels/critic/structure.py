"""What moves and adds activations without bending them: reshapes, sums, slices, concatenation, scaling, products.

Each keeps the batch as the first axis; a call that would move samples has no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.critic.tape import Node, NoRule, Tape, name_of


def layout_of(x: Tensor) -> torch.memory_format:
    """The order of an image's axes in memory, contiguous for anything else."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class Reshape(Node):
    def __init__(self, before: Tensor, after: torch.Size) -> None:
        self.before, self.after, self.layout = before.shape[1:], after[1:], layout_of(before)

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (cotangent.reshape(cotangent.shape[0], *self.before).contiguous(memory_format=self.layout),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else t.reshape(t.shape[0], *self.after)


class LinearMap(Node):
    """Any function that is linear in its input; its transpose is PyTorch's backward, where values do not matter."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        self.function, self.x, self.y = function, x, y  # y = function(x), with its graph

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        if cotangent.shape == self.y.shape:
            return torch.autograd.grad(self.y, self.x, cotangent, retain_graph=True)
        with torch.enable_grad():
            x = self.x[rows].detach().requires_grad_()
            y = self.function(x)
        return torch.autograd.grad(y, x, cotangent)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else self.function(t)


def record_linear(
    tape: Tape, input: Tensor, output: Callable[[Tensor], Tensor], tangent: Callable[[Tensor], Tensor]
) -> Tensor:
    """Record ``output``, whose derivative is the linear ``tangent``."""
    x = input.detach().requires_grad_()
    with torch.enable_grad():
        y = output(x)
    return tape.add(LinearMap(tangent, x, y), (input,), y.detach())


class Scale(Node):
    """y = x * factor, a constant that may have rows of its own."""

    def __init__(self, shape: torch.Size, factor: Any, by_row: bool) -> None:
        self.shape, self.factor, self.by_row = shape[1:], factor, by_row

    def _times(self, x: Tensor, rows: slice) -> Tensor:
        factor = self.factor[rows] if self.by_row else self.factor
        return x * factor

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (self._times(cotangent, rows).sum_to_size(cotangent.shape[0], *self.shape),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else self._times(t, rows)


class Add(Node):
    """y = x1 + alpha * x2, either of them perhaps constant."""

    def __init__(self, shapes: Sequence[torch.Size | None], after: torch.Size, alpha: float) -> None:
        self.shapes, self.after, self.alpha = shapes, after[1:], alpha

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        first, second = (None if s is None else cotangent.sum_to_size(len(cotangent), *s[1:]) for s in self.shapes)
        return first, second if second is None or self.alpha == 1 else second * self.alpha

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        first, second = tangents
        if first is None or second is None:
            only = first if second is None else second * self.alpha
            return None if only is None else only.expand(len(only), *self.after)
        return torch.add(first, second, alpha=self.alpha)


class Product(Node):
    """y = x1 * x2, element by element."""

    curved = True

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return self._across(cotangent, self.first[rows], self.second[rows])

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        first, second = tangents
        parts = []
        if first is not None:
            parts.append(first * self.second[rows])
        if second is not None:
            parts.append(self.first[rows] * second)
        return sum(parts[1:], parts[0]) if parts else None

    def curvature(self, tangents: Sequence[Tensor | None], cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return self._across(cotangent, *tangents)

    def _across(self, c: Tensor, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, ...]:
        return (
            None if second is None else (c * second).sum_to_size(len(c), *self.first.shape[1:]),
            None if first is None else (c * first).sum_to_size(len(c), *self.second.shape[1:]),
        )


class Concatenate(Node):
    def __init__(self, shapes: Sequence[torch.Size], dim: int) -> None:
        self.shapes, self.dim = shapes, dim

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return cotangent.split([s[self.dim] for s in self.shapes], self.dim)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        known = next((t for t in tangents if t is not None), None)
        if known is None:
            return None
        pairs = zip(tangents, self.shapes, strict=True)
        return torch.cat([known.new_zeros(len(known), *s[1:]) if t is None else t for t, s in pairs], self.dim)


# --- recording --------------------------------------------------------------------------------------------------------


def _axes(x: Tensor, dims: Any) -> tuple[int, ...]:
    """Axes counted from the front; NoRule where the batch is among them."""
    axes = tuple(d % x.dim() for d in ((dims,) if isinstance(dims, int) else dims))
    if 0 in axes:
        raise NoRule("the batch axis is reduced or moved")
    return axes


def reshaping(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def record(tape: Tape, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = function(input, *args, **kwargs)
        if output is input:
            return input
        return tape.add(Reshape(input, output.shape), (input,), output)

    return record


def _viewed(x: Tensor, *shape: Any) -> Tensor:
    """As ``Tensor.view``, of what the recorded way may have laid out otherwise."""
    if isinstance(shape[0], torch.dtype):
        raise NoRule("a view as another dtype")
    return x.reshape(*shape)


def linear_map(function: Callable[..., Tensor], check: Callable[..., Any] | None = None) -> Callable[..., Tensor]:
    """A rule for a linear function; ``check`` sees its arguments."""

    def record(tape: Tape, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not tape.is_active(input):
            raise NoRule(f"{name_of(function)} of a constant with recorded arguments")
        for arg in (*args, *kwargs.values()):
            tape.constant(arg, f"an argument of {name_of(function)}")
        if check is not None:
            check(input, *args, **kwargs)

        def call(x: Tensor) -> Tensor:
            return function(x, *args, **kwargs)

        return record_linear(tape, input, call, call)

    return record


def _check_reduction(input: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> None:
    if dim is None:
        raise NoRule("a reduction over the whole batch")
    _axes(input, dim)


def _check_swap(input: Tensor, dim0: int, dim1: int) -> None:
    _axes(input, (dim0, dim1))


def _check_permutation(input: Tensor, *dims: Any) -> None:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    _axes(input, order[1:])


def _check_slices(input: Tensor, index: Any) -> None:
    parts = index if isinstance(index, tuple) else (index,)
    whole = parts[0] is Ellipsis and len(parts) - 1 < input.dim()
    plain = all(isinstance(p, (slice, int)) or p is Ellipsis for p in parts)
    if not plain or not (whole or parts[0] == slice(None)):
        raise NoRule("an index that selects samples, or is not a slice")


def _check_one_axis(input: Tensor, size: Any, dim: int = 0, *rest: Any) -> None:
    _axes(input, dim)


def _check_cat(tape: Tape, tensors: Sequence[Tensor], dim: int) -> int:
    (axis,) = _axes(tensors[0], dim)
    if any(t.shape[0] != tape.rows for t in tensors):
        raise NoRule("a concatenation of batches")
    return axis


def record_cat(tape: Tape, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    axis = _check_cat(tape, tensors, dim)
    for t in tensors:
        if not tape.is_active(t):
            tape.constant(t, "a concatenated tensor")
    return tape.add(Concatenate([t.shape for t in tensors], axis), tuple(tensors), torch.cat(list(tensors), axis))


def _check_broadcast(tape: Tape, *operands: Any) -> None:
    """Samples must meet themselves: recorded operands have every axis of the result."""
    dims = max(x.dim() for x in operands if isinstance(x, Tensor))
    if any(tape.is_active(x) and x.dim() != dims for x in operands):
        raise NoRule("a broadcast that lines a batch up with another axis")


def _record_add(tape: Tape, first: Any, second: Any, alpha: float, in_place: bool) -> Tensor:
    active = [tape.is_active(x) for x in (first, second)]
    shapes = [x.shape if a else None for x, a in zip((first, second), active, strict=True)]
    for x, a in zip((first, second), active, strict=True):
        if not a:
            tape.constant(x, "an added tensor")
    _check_broadcast(tape, first, second)
    if in_place and not tape.is_active(first):
        raise NoRule("a constant is changed in place")
    add = tape.writable(first).add_ if in_place else partial(torch.add, first)
    output = add(second, alpha=alpha)
    return tape.add(Add(shapes, output.shape, alpha), (first, second), output)


def record_add(tape: Tape, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    return _record_add(tape, input, other, alpha, False)


def record_add_(tape: Tape, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    return _record_add(tape, input, other, alpha, True)


def record_sub(tape: Tape, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    return _record_add(tape, input, other, -alpha, False)


def record_neg(tape: Tape, input: Tensor) -> Tensor:
    return record_mul(tape, input, -1)


def record_rsub(tape: Tape, input: Tensor, other: Any) -> Tensor:
    return record_add(tape, record_neg(tape, input), other)


def record_mul(tape: Tape, input: Any, other: Any) -> Tensor:
    if tape.is_active(input) and isinstance(other, Tensor) and tape.is_active(other):
        _check_broadcast(tape, input, other)
        return tape.add(Product(tape.keep(input), tape.keep(other)), (input, other), torch.mul(input, other))
    if not tape.is_active(input):
        input, other = other, input
    factor = tape.constant(other, "a factor")
    return scaled(tape, input, factor)


def scaled(tape: Tape, input: Tensor, factor: Any, in_place: bool = False) -> Tensor:
    """Record input * factor, a constant."""
    by_row = isinstance(factor, Tensor) and factor.dim() == input.dim() and factor.shape[0] == tape.rows > 1
    shape = input.shape
    if isinstance(factor, Tensor):
        tape.keep(factor)
    _check_broadcast(tape, input, factor)
    output = tape.writable(input).mul_(factor) if in_place else input * factor
    return tape.add(Scale(shape, factor, by_row), (input,), output)


def record_div(tape: Tape, input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None or not tape.is_active(input):
        raise NoRule("a division by an activation, or one that rounds")
    divisor = tape.constant(other, "a divisor")
    if isinstance(divisor, Tensor):
        divisor = divisor.to(torch.promote_types(divisor.dtype, input.dtype))
    return scaled(tape, input, 1 / divisor)


def _pads_with_zeros(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> None:
    if len(pad) > 2 * (input.dim() - 1):
        raise NoRule("padding along the batch")


def record_pad(tape: Tape, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    _pads_with_zeros(input, pad)
    return record_linear(tape, input, lambda x: F.pad(x, pad, mode, value), lambda t: F.pad(t, pad, mode))


def record_identity(tape: Tape, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output: Tensor = torch.Tensor.contiguous(input, *args, **kwargs)
    return input if output is input else tape.add(Reshape(input, output.shape), (input,), output)


_T = torch.Tensor
RULES: dict[Any, Callable[..., Tensor]] = {
    **{f: reshaping(f) for f in (_T.reshape, _T.flatten, _T.squeeze, _T.unsqueeze, _T.unflatten)},
    _T.view: reshaping(_viewed),
    **{f: reshaping(f) for f in (torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.unflatten)},
    **{f: linear_map(f, _check_reduction) for f in (torch.mean, torch.sum, _T.mean, _T.sum)},
    **{f: linear_map(f, _check_swap) for f in (torch.transpose, _T.transpose, torch.swapaxes, _T.swapaxes)},
    **{f: linear_map(f, _check_permutation) for f in (torch.permute, _T.permute)},
    _T.__getitem__: linear_map(_T.__getitem__, _check_slices),
    **{f: linear_map(f) for f in (F.interpolate, F.pixel_shuffle, F.pixel_unshuffle)},
    **{f: linear_map(f) for f in (F.avg_pool1d, F.avg_pool3d)},
    **{f: linear_map(f) for f in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)},
    **{f: linear_map(f) for f in (_T.float, _T.double, _T.half, _T.bfloat16, _T.to)},
    _T.contiguous: record_identity,
    F.pad: record_pad,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), record_cat),
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), record_add),
    **dict.fromkeys((_T.add_, _T.__iadd__), record_add_),
    **dict.fromkeys((torch.sub, _T.sub, _T.__sub__, torch.subtract, _T.subtract), record_sub),
    **dict.fromkeys((torch.neg, _T.neg, _T.__neg__, torch.negative, _T.negative), record_neg),
    **dict.fromkeys((torch.rsub, _T.__rsub__), record_rsub),
    **dict.fromkeys((torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.multiply, _T.multiply), record_mul),
    **dict.fromkeys((torch.div, _T.div, _T.__truediv__, torch.true_divide, _T.true_divide), record_div),
}
