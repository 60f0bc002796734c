"""Interface of a rule: the VJP, the JVP and the second-order term of one call of the critic.

For a call y = f(a, b, ...) with Jacobian J and saved tensors s:

- pull:  VJP, from cotangents of y to J^T c, the cotangents of a, b, ...
- push:  JVP, from tangents of a, b, ... to J t, the tangent of y; None is zero
- bend:  second-order term, the derivative of <c, J t> by a, b, ...; None where it is zero

A weight is an argument like any other, but without a tangent: ``bend`` gives its share of a penalty's gradient.
Rules return the plain formula; the passes reduce broadcast axes and cast dtypes, as autograd's engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
Wanted = Sequence[bool]


class Saved(list[Any]):
    """Saved tensors of a call; ``notes`` caches intermediate results of a rule for its next use."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.notes: dict[str, Any] = {}


class Meta(NamedTuple):
    """Shape, dtype and device of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Layout(NamedTuple):
    """Position of the samples in a value: along ``axis``, ``block`` entries each."""

    axis: int
    block: int


Layouts = Sequence[Layout | None]
Shapes = Sequence[tuple[int, ...] | None]


class Rows(NamedTuple):
    """One row of a value whose elements are, in order, (outer, size, inner): those at ``index``."""

    outer: int
    size: int
    inner: int
    index: int

    def axis_of(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Return the axis that contains all rows, and how its entries are ordered: (axis, outer, inner)."""
        before = 1
        for axis, n in enumerate(shape):
            if before * n > self.outer:
                after = prod(shape[axis + 1 :])
                if (
                    self.outer % before
                    or self.inner % after
                    or before * n * after != self.outer * self.size * self.inner
                ):
                    return None
                return axis, self.outer // before, self.inner // after
            before *= n
        return None

    @classmethod
    def along(cls, shape: Sequence[int], axis: int, index: int) -> Rows:
        """Make the row at ``index`` of an axis."""
        return cls(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]), index)

    def cut(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the row alone, with all axes."""
        found, at = list(shape), self.axis_of(shape)
        assert at is not None
        found[at[0]] = at[1] * at[2]
        return tuple(found)

    def of(self, x: Tensor) -> Tensor:
        """Copy the row, with all axes; kernels read statistics without regard to strides."""
        at = self.axis_of(x.shape)
        assert at is not None
        axis, outer, inner = at
        rows = x.unflatten(axis, (outer, self.size, inner)).select(axis + 1, self.index)
        return rows.reshape(self.cut(x.shape)).contiguous()

    def like(self, shape: Sequence[int], output: Sequence[int]) -> Rows | None:
        """Return the same row of a tensor that is broadcast to ``output``, None where all rows share one.

        Raises Mixed where the tensor has no such row.
        """
        at = self.axis_of(output)
        axis = -1 if at is None else at[0] - len(output) + len(shape)
        if at is None:
            raise Mixed
        if axis < 0 or shape[axis] == 1:
            return None
        if shape[axis] != output[at[0]]:
            raise Mixed
        return Rows(prod(shape[:axis]) * at[1], self.size, at[2] * prod(shape[axis + 1 :]), self.index)


RowsRead = tuple[Sequence[Rows | None], Sequence[Rows | None]]


class Mixed(Exception):
    """Raised where samples interact in a call, or their independence cannot be proved."""


class Unfit(Exception):
    """Raised where a rule does not support a call, which is then left to autograd."""


class Rule:
    """Rule of a call, for its shapes and constants.

    names: of autograd's nodes. saved: names of the tensors that are read, as autograd's. constants: the same for
    numbers. origins: for each saved tensor, the argument that it is, or -1 for the output. sends: whether PyTorch's
    double backward returns a gradient, possibly zero, for the arguments. shared_operand: the argument, saved first,
    whose tangent enters the weight gradient. joins: up to how many times the size of the weight, on a CPU, copying that
    argument is cheaper than two products. adds: the argument that is added to every row of the output, which are along
    axis 0, with one number for each entry of axis 1.
    """

    names: ClassVar[tuple[str, ...]] = ()
    saved: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()
    origins: ClassVar[tuple[int, ...]] = ()
    sends: ClassVar[bool] = False
    indexes: ClassVar[bool] = False  # whether a last constant says that the saved tensors index row by row
    flat: bool = False  # whether every tangent of the output is zero
    adds: int | None = None
    shared_operand: ClassVar[int | None] = None
    joins: ClassVar[float] = inf

    def __init__(self, constants: tuple[Any, ...], inputs: Sequence[Meta | None], outputs: Sequence[Meta]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.set_up(*constants)

    def set_up(self, *constants: Any) -> None:
        """Store the constants, in the order of ``constants``; raise Unfit where they are not supported."""

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        """Compute the VJP: cotangents of the wanted arguments."""
        raise NotImplementedError

    def push(self, s: Saved, t: Tensors) -> Tensors:
        """Compute the JVP: tangents of the outputs."""
        raise NotImplementedError

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        """Compute the second-order term: the derivative of <c, J t> by the wanted arguments."""
        return (None,) * len(self.inputs)

    def curved(self, moving: Sequence[bool]) -> bool:
        """Whether ``bend`` is nonzero for an argument that depends on the input; moving: which arguments do."""
        return False

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        """Which arguments PyTorch's double backward returns a gradient for, possibly zero."""
        return [self.sends] * len(self.inputs)

    def flops(self, shapes: Shapes) -> int:
        """FLOPs of the call's products; shapes: of the saved tensors."""
        return 0

    def layout(self, layouts: Layouts) -> Layout | None:
        """Derive the layout of the output from those of the arguments; raise Mixed where there is none."""
        raise Mixed

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        """Derive the layouts of the saved tensors, from their shapes."""
        return [out if i < 0 else layouts[i] for i in self.origins]

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        """Return what one row of the output is computed from: the row of each argument and saved tensor.

        None is for all of it. Raises Mixed where the row needs others, or this is not known. shapes: of the saved
        tensors.
        """
        raise Mixed


Formula = Callable[..., Tensor]


def aligned(layouts: Layouts, inputs: Sequence[Meta | None], output: Meta) -> Layout | None:
    """Derive the layout of the output where arguments are broadcast against each other."""
    found: Layout | None = None
    for layout, x in zip(layouts, inputs, strict=True):
        if layout is not None and x is not None:
            axis = layout.axis + len(output.shape) - len(x.shape)
            if x.shape[layout.axis] != output.shape[axis]:
                raise Mixed  # a single sample is broadcast
            own = Layout(axis, layout.block)
            if found is not None and found != own:  # symbolic sizes have no hash
                raise Mixed
            found = own
    return found


class Elementwise(Rule):
    """Rule of a call whose arguments are broadcast against each other."""

    def layout(self, layouts: Layouts) -> Layout | None:
        return aligned(layouts, self.inputs, self.outputs[0])

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        if out is None:
            return [None] * len(shapes)
        dims = len(self.outputs[0].shape)
        return [None if s is None else Layout(out.axis - dims + len(s), out.block) for s in shapes]

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        output = self.outputs[0].shape
        arguments = [None if x is None else row.like(x.shape, output) for x in self.inputs]
        return arguments, [None if s is None else row.like(s, output) for s in shapes]


class Unary(Elementwise):
    """y = f(x), elementwise: ``slope(c, ...)`` is c f'(x), ``bent(u, ...)`` is u f''(x).

    turned: where f'' follows from f', adds q f''(x) / f'(x) to its first argument; q = c f'(x) t is known already.
    lasts: whether f'(x) alone costs no more than ``slope``, so that it is worth keeping for passes in backward.
    bend_by: a factor of f''(x) that ``prepare`` leaves out.
    """

    slope: Formula
    bent: Formula | None = None
    turned: Callable[..., None] | None = None
    sends = True
    lasts = False
    bend_by: float = 1

    def prepare(self, *s: Any) -> tuple[Tensor, Tensor] | None:
        """Compute f'(x) and f''(x) / bend_by, where they are expensive enough to be shared by all passes; else None."""
        return None

    def prepared(self, s: Saved) -> tuple[Tensor, Tensor] | None:
        """Return the shared derivatives, computing them at the first call."""
        if "slopes" not in s.notes:
            s.notes["slopes"] = self.prepare(*s)
        return s.notes["slopes"]

    def _sloped(self, u: Tensor | None, s: Saved) -> Tensors:
        known = s.notes.get("slopes")
        return (self.slope(u, *s) if known is None else u * known[0],)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return self._sloped(c[0], s)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        pushed = self._sloped(t[0], s)
        if self.turned is not None:
            s.notes["pushed"] = t[0], pushed[0]
        return pushed

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        if self.bent is None or t[0] is None or c[0] is None:
            return (None,)
        u, known = t[0] * c[0], s.notes.get("slopes")
        if known is None:
            return (self.bent(u, *s),)
        return (u * known[1] if self.bend_by == 1 else (u * known[1]).mul_(self.bend_by),)

    def add_bent(self, base: Tensor, s: Saved, t: Tensors, c: Tensors) -> None:
        """Add the result of ``bend`` to ``base``, in place."""
        before, pushed = s.notes.pop("pushed", (None, None))
        if t[0] is None or c[0] is None:
            return
        alike = t[0].dtype == c[0].dtype == base.dtype and t[0].shape == c[0].shape == base.shape
        if self.turned is not None and alike and before is t[0] and pushed is not None:
            self.turned(base, c[0] * pushed, *s)
        elif alike and s.notes.get("slopes") is not None:
            base.addcmul_(t[0] * c[0], s.notes["slopes"][1], value=self.bend_by)
        else:
            (bent,) = self.bend(s, t, c, (True,))
            if bent is not None:
                base.add_(bent)


class Linear(Rule):
    """y = A x for one argument: ``back(c)`` is A^T c, ``forth(t)`` is A t. There is no second-order term."""

    def back(self, c: Tensor, *s: Any) -> Tensor:
        raise NotImplementedError

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        raise NotImplementedError

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return (self.back(c[0], *s), *[None] * (len(self.inputs) - 1))  # type: ignore[arg-type]

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return (self.forth(t[0], *s),)  # type: ignore[arg-type]
