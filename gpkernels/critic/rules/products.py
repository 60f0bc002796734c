"""Products of matrices, batched matrices and vectors, and convolutions.

The three products of a convolution are ATen's backward with an output mask, which computes what is needed and no more;
PyTorch's double backward of a convolution computes the weight gradient as a convolution with exchanged operands
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.rules.base import (
    Layout,
    Layouts,
    Mixed,
    Rows,
    RowsRead,
    Rule,
    Saved,
    Shapes,
    Tensors,
    Wanted,
)

aten = torch.ops.aten


class Lazy:
    """left^T right, computed together with the sum that it is added to; rows are contracted."""

    __slots__ = ("left", "right")

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    def t(self) -> Lazy:
        return Lazy(self.right, self.left)

    def value(self, onto: Tensor | None = None) -> Tensor:
        if onto is None:
            return torch.mm(self.left.t(), self.right)
        return torch.addmm(onto, self.left.t(), self.right)


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [p for p in parts if p is not None]
    if not known:
        return None
    return known[0] if len(known) == 1 else known[0] + known[1]


class Product(Rule):
    """y = extra + alpha a * b, where * is linear in a and in b; ``first`` is the index of a among the arguments."""

    first = shared_operand = 0
    alpha: float = 1
    beta: float = 1

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def to_a(self, c: Tensor, b: Tensor, a: Tensor | None) -> Any:
        """Compute the cotangent of a. ``a`` is read for its shape at most."""
        raise NotImplementedError

    def to_b(self, c: Tensor, a: Tensor, b: Tensor | None) -> Any:
        raise NotImplementedError

    def extra(self, c: Tensor) -> Tensor:
        """Compute the cotangent of the summand."""
        return c if self.beta == 1 else c * self.beta

    def row_of_a(self, row: Rows, a: Sequence[int]) -> Rows:
        """Return the row of a, of that shape, which a row of the output is computed from with all of b."""
        raise Mixed

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        a, others = self.inputs[self.first], self.inputs[: self.first]
        if a is None:
            raise Mixed
        of_a = self.row_of_a(row, a.shape)
        extra = [None if x is None else row.like(x.shape, self.outputs[0].shape) for x in others]
        return [*extra, of_a, None], [None if shapes[0] is None else of_a, None]

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.alpha == 1 else x * self.alpha

    def curved(self, moving: Sequence[bool]) -> bool:
        return all(moving[self.first : self.first + 2])

    def flops(self, shapes: Shapes) -> int:
        a = self.inputs[self.first]
        left = a.shape if a is not None else shapes[0]  # read by the weight gradient
        return 2 * prod(self.outputs[0].shape) * (left[-1] if left else 1)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Any:
        (a, b), cotangent, i = s, c[0], self.first
        found: list[Any] = [None] * len(self.inputs)
        if i and wanted[0]:
            found[0] = self.extra(cotangent)  # type: ignore[arg-type]
        scaled = self._scaled(cotangent)  # type: ignore[arg-type]
        if wanted[i]:
            found[i] = self.to_a(scaled, b, a)
        if wanted[i + 1]:
            found[i + 1] = self.to_b(scaled, a, b)
        return found

    def push(self, s: Saved, t: Tensors) -> Tensors:
        (a, b), i = s, self.first
        parts = []
        if t[i] is not None:
            parts.append(self.product(t[i], b))  # type: ignore[arg-type]
        if t[i + 1] is not None:
            parts.append(self.product(a, t[i + 1]))  # type: ignore[arg-type]
        whole = _sum(parts)
        whole = None if whole is None else self._scaled(whole)
        if i and t[0] is not None:
            whole = _sum([whole, self.extra(t[0])])
        return (whole,)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Any:
        (a, b), cotangent, i = s, c[0], self.first
        found: list[Any] = [None] * len(self.inputs)
        scaled = self._scaled(cotangent)  # type: ignore[arg-type]
        if wanted[i] and t[i + 1] is not None:
            found[i] = self.to_a(scaled, t[i + 1], a)  # type: ignore[arg-type]
        if wanted[i + 1] and t[i] is not None:
            found[i + 1] = self.to_b(scaled, t[i], b)  # type: ignore[arg-type]
        return found


class MM(Product):
    names = ("MmBackward0",)
    saved, origins = ("self", "mat2"), (0, 1)
    joins = 1.5

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b)

    def to_a(self, c: Tensor, b: Tensor, a: Tensor | None) -> Any:
        return torch.mm(c, b.t())

    def to_b(self, c: Tensor, a: Tensor, b: Tensor | None) -> Any:
        return Lazy(a, c)

    def layout(self, layouts: Layouts) -> Layout | None:
        a, b = layouts[self.first : self.first + 2]
        if a is None or b is not None or a.axis != 0 or (self.first and layouts[0] not in (None, a)):
            raise Mixed
        return a

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [layouts[self.first], None]

    def row_of_a(self, row: Rows, a: Sequence[int]) -> Rows:
        at = row.axis_of(self.outputs[0].shape)
        if at is None or at[0]:
            raise Mixed
        return Rows(at[1], row.size, at[2] * a[1], row.index)


class Addmm(MM):
    names = ("AddmmBackward0",)
    saved, constants = ("mat1", "mat2"), ("alpha", "beta")
    first = shared_operand = 1

    def set_up(self, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self.adds = 0 if beta == 1 else None


class BMM(Product):
    names = ("BmmBackward0",)
    saved, origins = ("self", "mat2"), (0, 1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    def to_a(self, c: Tensor, b: Tensor, a: Tensor | None) -> Any:
        return torch.bmm(c, b.transpose(1, 2))

    def to_b(self, c: Tensor, a: Tensor, b: Tensor | None) -> Any:
        return torch.bmm(a.transpose(1, 2), c)

    def layout(self, layouts: Layouts) -> Layout | None:
        a, b = layouts[self.first : self.first + 2]
        if self.first and layouts[0] is not None:
            raise Mixed
        if a is not None and a.axis == 1 and b is None:
            return a
        if (a is not None and a.axis != 0) or (b is not None and b.axis != 0) or (a and b and a != b):
            raise Mixed
        return a or b

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        given = layouts[self.first : self.first + 2]
        return list(given) if out is None or out.axis else [out, out]

    def row_of_a(self, row: Rows, a: Sequence[int]) -> Rows:
        if row.axis_of(self.outputs[0].shape) != (1, 1, 1):
            raise Mixed
        return Rows.along(a, 1, row.index)


class Baddbmm(BMM):
    names = ("BaddbmmBackward0",)
    saved, constants = ("batch1", "batch2"), ("alpha", "beta")
    first = shared_operand = 1

    def set_up(self, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta


class MV(Product):
    names = ("MvBackward0",)
    saved, origins = ("self", "vec"), (0, 1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mv(a, b)

    def to_a(self, c: Tensor, b: Tensor, a: Tensor | None) -> Any:
        return c[:, None] * b

    def to_b(self, c: Tensor, a: Tensor, b: Tensor | None) -> Any:
        return torch.mv(a.t(), c)

    layout, saved_layouts = MM.layout, MM.saved_layouts


class Dot(Product):
    names = ("DotBackward0",)
    saved, origins = ("self", "tensor"), (0, 1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.dot(a, b)

    def to_a(self, c: Tensor, b: Tensor, a: Tensor | None) -> Any:
        return c * b

    def to_b(self, c: Tensor, a: Tensor, b: Tensor | None) -> Any:
        return c * a


class Vdot(Dot):
    names = ("VdotBackward0",)
    saved = ("self", "other")


class Convolution(Product):
    """Convolution of one to three dimensions, plain or transposed, with stride, padding, dilation and groups."""

    names = ("ConvolutionBackward0",)
    saved, origins = ("input", "weight"), (0, 1)
    constants = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    joins = 8
    adds = 2

    def set_up(self, *geometry: Any) -> None:
        self.geometry = [list(g) if isinstance(g, tuple) else g for g in geometry]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return aten.convolution(a, b, None, *self.geometry)

    def flops(self, shapes: Shapes) -> int:
        weight = self.inputs[1]
        kernel = weight.shape if weight is not None else shapes[1]
        return 2 * prod(self.outputs[0].shape) * (prod(kernel[1:]) if kernel else 1)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Any:
        (x, w), cotangent = s, c[0]
        bias = self.inputs[2]
        sizes = None if bias is None or not wanted[2] else list(bias.shape)
        assert cotangent is not None
        if sizes is not None and not wanted[1]:  # a plain sum; oneDNN would compute the weight gradient as well
            to_bias = cotangent.sum([axis for axis in range(cotangent.dim()) if axis != 1])
            return (self.to_a(cotangent, w, x) if wanted[0] else None), None, to_bias
        mask = [bool(wanted[0]), bool(wanted[1]), sizes is not None]
        return aten.convolution_backward(cotangent, x, w, sizes, *self.geometry, mask)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        (pushed,), bias = super().push(s, t), t[2]
        return (pushed if bias is None else _sum([pushed, bias.reshape(-1, *[1] * (len(self.outputs[0].shape) - 2))]),)

    def to_a(self, c: Tensor, b: Tensor, a: Tensor | None) -> Any:
        return aten.convolution_backward(c, a, b, None, *self.geometry, [True, False, False])[0]

    def to_b(self, c: Tensor, a: Tensor, b: Tensor | None) -> Any:
        return aten.convolution_backward(c, a, b, None, *self.geometry, [False, True, False])[1]

    def layout(self, layouts: Layouts) -> Layout | None:
        x, *rest = layouts
        if x is None or any(rest) or x.axis != 0:
            raise Mixed
        return x

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [out, None]


RULES: tuple[type[Rule], ...] = (MM, Addmm, BMM, Baddbmm, MV, Dot, Vdot, Convolution)
