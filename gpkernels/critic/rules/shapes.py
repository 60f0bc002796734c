"""Linear maps that move elements: views, splits, concatenations."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.rules.base import (
    Layout,
    Layouts,
    Linear,
    Mixed,
    Rows,
    RowsRead,
    Rule,
    Saved,
    Shapes,
    Tensors,
    Unfit,
    Wanted,
)

aten = torch.ops.aten


class Moving(Linear):
    """Linear map of one argument; ``shape`` and ``after`` are the shapes of the argument and the output."""

    @property
    def shape(self) -> tuple[int, ...]:
        (x, *_) = self.inputs
        assert x is not None
        return x.shape

    @property
    def after(self) -> tuple[int, ...]:
        return self.outputs[0].shape

    def axis(self, dim: int) -> int:
        return dim % max(1, len(self.shape))


class View(Moving):
    names = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0")

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.reshape(self.shape)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.reshape(self.after)

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        if at is None:
            return None
        before, after = self.shape, self.after
        outer, size = prod(before[: at.axis]), before[at.axis]
        samples, inner = size // at.block, at.block * prod(before[at.axis + 1 :])
        total = 1
        for axis, n in enumerate(after):
            if total == outer and n % samples == 0 and n // samples * prod(after[axis + 1 :]) == inner:
                return Layout(axis, n // samples)
            total *= n
        raise Mixed

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        return [row], []


class Squeeze(View):
    names = ("UnsqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2")


class T(Moving):
    names = ("TBackward0",)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.t()

    forth = back

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        return None if at is None else Layout(len(self.shape) - 1 - at.axis, at.block)


class Transpose(Moving):
    names = ("TransposeBackward0", "TransposeBackward1")
    constants = ("dim0", "dim1")

    def set_up(self, dim0: int, dim1: int) -> None:
        self.pair = dim0, dim1

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.transpose(*self.pair)

    forth = back

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        if at is None:
            return None
        a, b = (self.axis(d) for d in self.pair)
        return Layout({a: b, b: a}.get(at.axis, at.axis), at.block)

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        at, (a, b) = row.axis_of(self.after), (self.axis(d) for d in self.pair)
        if at is None or at[1:] != (1, 1):
            raise Mixed
        return [Rows.along(self.shape, {a: b, b: a}.get(at[0], at[0]), row.index)], []


class Permute(Moving):
    names = ("PermuteBackward0",)
    constants = ("dims",)

    def set_up(self, dims: tuple[int, ...]) -> None:
        self.order = [self.axis(d) for d in dims]
        self.inverse = sorted(range(len(dims)), key=self.order.__getitem__)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.permute(self.inverse)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.permute(self.order)

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        return None if at is None else Layout(self.order.index(at.axis), at.block)

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        at = row.axis_of(self.after)
        if at is None or at[1:] != (1, 1):
            raise Mixed
        return [Rows.along(self.shape, self.order[at[0]], row.index)], []


class Along(Moving):
    """Map within some axes, which must not be the samples'; the other axes keep their position."""

    def axes(self) -> set[int]:
        """Return the axes of the argument within which the map acts."""
        raise NotImplementedError

    def layout(self, layouts: Layouts) -> Layout | None:
        at = layouts[0]
        if at is not None and at.axis in self.axes():
            raise Mixed
        return at


class Expand(Moving):
    names = ("ExpandBackward0",)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c  # reduced by the passes

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        if at is None:
            return None
        axis = at.axis + len(self.after) - len(self.shape)
        if self.after[axis] != self.shape[at.axis]:
            raise Mixed
        return Layout(axis, at.block)

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        return [row.like(self.shape, self.after)], []


class Slice(Along):
    names = ("SliceBackward0",)
    constants = ("dim", "start", "end", "step")

    def set_up(self, dim: int, start: int | None, end: int | None, step: int) -> None:
        self.part = self.axis(dim), start, end, step

    def axes(self) -> set[int]:
        return {self.part[0]} if self.shape[self.part[0]] != self.after[self.part[0]] else set()

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten.slice_backward(c, self.shape, self.part[0], *self._bounds())

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return aten.slice(t, *self.part)

    def row(self) -> int | None:
        """Return the index of the only row that is left, if there is one."""
        axis, start, end, step = self.part
        rows = range(self.shape[axis])[slice(start, end, step)] if isinstance(self.shape[axis], int) else ()
        return rows[0] if len(rows) == 1 else None

    def _bounds(self) -> tuple[int, int, int]:
        axis, start, end, step = self.part
        return 0 if start is None else start, self.shape[axis] if end is None else end, step


class Select(Along):
    names = ("SelectBackward0",)
    constants = ("dim", "index")

    def set_up(self, dim: int, index: int) -> None:
        self.part = self.axis(dim), index

    def row(self) -> int | None:
        """Return the index of the selected row."""
        axis, index = self.part
        return index if index >= 0 else index + self.shape[axis]

    def axes(self) -> set[int]:
        return {self.part[0]}

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten.select_backward(c, self.shape, *self.part)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.select(*self.part)

    def layout(self, layouts: Layouts) -> Layout | None:
        at = super().layout(layouts)
        return at if at is None or at.axis < self.part[0] else Layout(at.axis - 1, at.block)


class Flip(Along):
    names = ("FlipBackward0",)
    constants = ("dims",)

    def set_up(self, dims: tuple[int, ...]) -> None:
        self.dims = [self.axis(d) for d in dims]

    def axes(self) -> set[int]:
        return set(self.dims)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.flip(self.dims)

    forth = back


class Roll(Along):
    names = ("RollBackward0",)
    constants = ("shifts", "dims")

    def set_up(self, shifts: tuple[int, ...], dims: tuple[int, ...]) -> None:
        self.shifts, self.dims = list(shifts), list(dims)

    def axes(self) -> set[int]:
        return {self.axis(d) for d in self.dims} if self.dims else set(range(len(self.shape)))

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.roll([-n for n in self.shifts], self.dims)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.roll(self.shifts, self.dims)


class Tril(Moving):
    names = ("TrilBackward0",)
    constants = ("diagonal",)

    def set_up(self, diagonal: int) -> None:
        self.diagonal = diagonal

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.tril(self.diagonal)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return self.back(t)

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        if at is not None and at.axis >= len(self.shape) - 2:
            raise Mixed
        return at


class Triu(Tril):
    names = ("TriuBackward0",)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.triu(self.diagonal)


class Cumsum(Along):
    names = ("CumsumBackward0",)
    constants = ("dim",)

    def set_up(self, dim: int) -> None:
        self.dim = self.axis(dim)

    def axes(self) -> set[int]:
        return {self.dim}

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.flip(self.dim).cumsum(self.dim).flip(self.dim)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.cumsum(self.dim)


class Repeat(Moving):
    names = ("RepeatBackward0",)
    constants = ("repeats",)

    def set_up(self, repeats: tuple[int, ...]) -> None:
        self.repeats = list(repeats)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        extra = len(self.repeats) - len(self.shape)
        own = [1] * extra + list(self.shape)
        split = [n for pair in zip(self.repeats, own, strict=True) for n in pair]
        return c.reshape(split).sum(list(range(0, 2 * len(own), 2))).reshape(self.shape)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.repeat(self.repeats)

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        if at is None:
            return None
        axis = at.axis + len(self.repeats) - len(self.shape)
        if self.repeats[axis] != 1:
            raise Mixed
        return Layout(axis, at.block)


class Split(Rule):
    """Split into several outputs; unused ones have no cotangent."""

    names = ("SplitBackward0", "UnsafeSplitBackward0")
    constants = ("dim",)
    unbinds = False

    def set_up(self, dim: int, *sizes: Any) -> None:
        (x,) = self.inputs
        assert x is not None
        self.dim = dim % len(x.shape)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        known = next(u for u in c if u is not None)
        parts = [known.new_zeros(o.shape) if u is None else u for u, o in zip(c, self.outputs, strict=True)]
        return (torch.stack(parts, self.dim) if self.unbinds else torch.cat(parts, self.dim),)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        (tangent,) = t
        assert tangent is not None
        if self.unbinds:
            return tangent.unbind(self.dim)
        return tangent.split([o.shape[self.dim] for o in self.outputs], self.dim)

    def layout(self, layouts: Layouts) -> Layout | None:
        (at,) = layouts
        if at is not None and at.axis == self.dim:
            raise Mixed
        return at if at is None or not self.unbinds or at.axis < self.dim else Layout(at.axis - 1, at.block)


class SplitWithSizes(Split):
    names = ("SplitWithSizesBackward0", "UnsafeSplitWithSizesBackward0")


class Unbind(Split):
    names = ("UnbindBackward0",)
    unbinds = True


class Cat(Rule):
    """Concatenation. Arguments without an axis, which PyTorch skips, are left to autograd."""

    names = ("CatBackward0",)
    constants = ("dim",)
    stacks = False

    def set_up(self, dim: int) -> None:
        (output,) = self.outputs
        self.dim = dim % len(output.shape)
        self.lengths = [1] * len(self.inputs)
        if self.stacks:
            return
        # The lengths of constants are not in the graph; the rest of the output must be theirs.
        known = [x for x in self.inputs if x is not None]
        if len(known) < len(self.inputs) - 1 or any(len(x.shape) != len(output.shape) for x in known):
            raise Unfit("the lengths of its arguments are unknown")
        rest = output.shape[self.dim] - sum(x.shape[self.dim] for x in known)
        self.lengths = [rest if x is None else x.shape[self.dim] for x in self.inputs]

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        cotangent = c[0]
        assert cotangent is not None
        at, parts = 0, []
        for w, n in zip(wanted, self.lengths, strict=True):
            part = cotangent.narrow(self.dim, at, n) if w else None
            parts.append(part.squeeze(self.dim) if part is not None and self.stacks else part)
            at += n
        return parts

    def push(self, s: Saved, t: Tensors) -> Tensors:
        known = next(u for u in t if u is not None)
        parts = []
        for u, n in zip(t, self.lengths, strict=True):
            shape = list(self.outputs[0].shape)
            shape[self.dim] = n
            parts.append(known.new_zeros(shape) if u is None else u.reshape(shape))
        return (torch.cat(parts, self.dim),)

    def layout(self, layouts: Layouts) -> Layout | None:
        found = [at for at in layouts if at is not None]
        if not found:
            return None
        at = found[0]
        if any(other != at for other in found[1:]):  # symbolic sizes have no hash
            raise Mixed
        if self.stacks:
            return Layout(at.axis + (at.axis >= self.dim), at.block)
        if at.axis == self.dim:
            raise Mixed
        return at


class Stack(Cat):
    names = ("StackBackward0",)
    stacks = True


RULES: tuple[type[Rule], ...] = (
    *(View, Squeeze, T, Transpose, Permute, Expand, Slice, Select, Flip, Roll, Tril, Triu, Cumsum, Repeat),
    *(Split, SplitWithSizes, Unbind, Cat, Stack),
)
