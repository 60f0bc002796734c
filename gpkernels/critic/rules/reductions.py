"""Sums, means, maxima, and indexing by tensors."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Layout, Layouts, Mixed, Rule, Saved, Shapes, Tensors, Unfit, Wanted
from gpkernels.critic.rules.shapes import Along

aten = torch.ops.aten


class Index(Rule):
    """y = x[i, j, ...]. Where i counts the rows, as in ``logits[torch.arange(n), labels]``, samples are independent."""

    names = ("IndexBackward0",)
    saved, origins, indexes = ("indices",), (), True

    def set_up(self, by_row: bool) -> None:
        x = self.inputs[0]
        self.by_row = by_row and x is not None and x.shape[0] == self.outputs[0].shape[0]  # not the first rows of more

    def _indices(self, s: Saved, rows: Tensor) -> list[Any]:
        """Return the indices, of all rows or of some; rows: a tensor with as many."""
        return [torch.arange(rows.shape[0], device=rows.device), *list(s)[1:]] if self.by_row else list(s)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, cotangent = self.inputs[0], c[0]
        assert x is not None
        assert cotangent is not None
        zeros = cotangent.new_zeros((cotangent.shape[0], *x.shape[1:]) if self.by_row else x.shape)
        return (aten._index_put_impl_(zeros, self._indices(s, cotangent), cotangent, True, True),)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        assert t[0] is not None
        return (aten.index(t[0], self._indices(s, t[0])),)

    def layout(self, layouts: Layouts) -> Layout | None:
        if not self.by_row or layouts[0] != Layout(0, 1):
            raise Mixed
        return layouts[0]

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [None if out is None or s is None else out for s in shapes]


class Gather(Along):
    names = ("GatherBackward0",)
    saved, origins, constants = ("index",), (-1,), ("dim",)

    def set_up(self, dim: int) -> None:
        self.dim = self.axis(dim)

    def axes(self) -> set[int]:
        return {self.dim} | {i for i, (a, b) in enumerate(zip(self.shape, self.after, strict=True)) if a != b}

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.new_zeros(self.shape).scatter_add_(self.dim, s[0], c)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.gather(self.dim, s[0])


class IndexSelect(Along):
    names = ("IndexSelectBackward0",)
    saved, origins, constants = ("index",), (0,), ("dim",)

    def set_up(self, dim: int) -> None:
        self.dim = self.axis(dim)

    def axes(self) -> set[int]:
        return {self.dim}

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [None]

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.new_zeros(self.shape).index_add_(self.dim, s[0], c)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.index_select(self.dim, s[0])


class Adding(Rule):
    """y = x, with a source added at indices along an axis; either may be a constant."""

    saved, origins = ("index",), ()
    dim: int

    def gathered(self, c: Tensor, index: Tensor) -> Tensor:
        """Return the cotangent of the source."""
        raise NotImplementedError

    def scattered(self, t: Tensor, of_source: Tensor, index: Tensor) -> Tensor:
        """Add a tangent of the source to one of the output."""
        raise NotImplementedError

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        cotangent = c[0]
        assert cotangent is not None
        return cotangent if wanted[0] else None, self.gathered(cotangent, s[0]) if wanted[1] else None

    def push(self, s: Saved, t: Tensors) -> Tensors:
        tangent, of_source = t
        if of_source is None:
            return (tangent,)
        if tangent is None:
            tangent = of_source.new_zeros(self.outputs[0].shape)
        return (self.scattered(tangent, of_source, s[0]),)

    def layout(self, layouts: Layouts) -> Layout | None:
        known = [at for at, x in zip(layouts, self.inputs, strict=True) if x is not None]
        at = known[0]
        if any(other != at for other in known):
            raise Mixed
        if at is not None and at.axis in self.axes():
            raise Mixed
        return at

    def axes(self) -> set[int]:
        """Return the axes that samples must not be on."""
        return {self.dim}


class IndexAdd(Adding):
    names = ("IndexAddBackward0",)
    constants = ("dim", "alpha")

    def set_up(self, dim: int, alpha: float) -> None:
        source, own = self.inputs[1], self.outputs[0].shape
        if source is None or len(source.shape) != len(own) or not own:
            raise Unfit("the source is a constant or a number")
        self.dim, self.alpha = dim % len(own), alpha

    def gathered(self, c: Tensor, index: Tensor) -> Tensor:
        found = c.index_select(self.dim, index)
        return found if self.alpha == 1 else found * self.alpha

    def scattered(self, t: Tensor, of_source: Tensor, index: Tensor) -> Tensor:
        return t.index_add(self.dim, index, of_source, alpha=self.alpha)

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [None]


class ScatterAdd(Adding):
    names = ("ScatterAddBackward0",)
    constants = ("dim",)

    def set_up(self, dim: int) -> None:
        source, own = self.inputs[1], self.outputs[0].shape
        if source is None or len(source.shape) != len(own) or not own:
            raise Unfit("the source is a constant or a number")
        self.dim = dim % len(own)
        self._others = {i for i, (a, b) in enumerate(zip(source.shape, own, strict=True)) if a != b}

    def axes(self) -> set[int]:
        return {self.dim} | self._others

    def gathered(self, c: Tensor, index: Tensor) -> Tensor:
        return c.gather(self.dim, index)

    def scattered(self, t: Tensor, of_source: Tensor, index: Tensor) -> Tensor:
        return t.scatter_add(self.dim, index, of_source)

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [out]


class Picked(Along):
    """Elements in order, or the largest: as ``Gather`` at known indices, each of which occurs once."""

    names = ("SortBackward0", "SortBackward1", "TopkBackward0")
    saved, origins, constants = ("indices",), (-1,), ("dim",)

    def set_up(self, dim: int) -> None:
        if not self.shape:
            raise Unfit("a number has no axis")
        self.dim = self.axis(dim)

    def axes(self) -> set[int]:
        return {self.dim}

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c.new_zeros(self.shape).scatter_(self.dim, s[0], c)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.gather(self.dim, s[0])


class Embedding(Rule):
    """Lookup in a trained table, the only argument with a gradient."""

    names = ("EmbeddingBackward0",)
    saved, origins = ("indices",), (-1,)
    constants = ("padding_idx", "scale_grad_by_freq", "sparse", "weight_sym_argsize_0")

    def set_up(self, padding: int, by_frequency: bool, sparse: bool, entries: int) -> None:
        self.padding, self.by_frequency, self.sparse, self.entries = padding, by_frequency, sparse, entries

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        options = (self.entries, self.padding, self.by_frequency, self.sparse)
        return (aten.embedding_backward(c[0], s[0], *options),)


class Sum(Along):
    names = ("SumBackward1",)
    constants = ("dim", "keepdim")

    def set_up(self, dim: Any = None, keepdim: bool = False) -> None:
        dims = (dim,) if isinstance(dim, int) else dim or range(len(self.shape))
        self.dims, self.keepdim = sorted(self.axis(d) for d in dims), keepdim
        self.count = prod(self.shape[d] for d in self.dims)

    def axes(self) -> set[int]:
        return set(self.dims)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return self._kept(c).expand(self.shape)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.sum(self.dims, self.keepdim) if self.dims else t

    def _kept(self, c: Tensor) -> Tensor:
        """Restore the reduced axes."""
        return c if self.keepdim else c.reshape([1 if d in self.dims else n for d, n in enumerate(self.shape)])

    def layout(self, layouts: Layouts) -> Layout | None:
        at = super().layout(layouts)
        if at is None or self.keepdim:
            return at
        return Layout(at.axis - sum(d < at.axis for d in self.dims), at.block)


class SumAll(Sum):
    names = ("SumBackward0",)
    constants = ()


class Mean(Sum):
    names = ("MeanBackward1",)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return (self._kept(c) / self.count).expand(self.shape)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t.mean(self.dims, self.keepdim) if self.dims else t


class MeanAll(Mean):
    names = ("MeanBackward0",)
    constants = ()


class MaxAlong(Along):
    names = ("MaxBackward0", "MinBackward0")
    saved, origins, constants = ("indices",), (-1,), ("dim", "keepdim")

    def set_up(self, dim: int, keepdim: bool) -> None:
        self.dim, self.keepdim = self.axis(dim), keepdim

    def axes(self) -> set[int]:
        return {self.dim}

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        cotangent, places = self._kept(c[0]), self._kept(s[0])  # type: ignore[arg-type]
        return (cotangent.new_zeros(self.shape).scatter_(self.dim, places, cotangent),)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        (tangent,) = t
        assert tangent is not None
        picked = tangent.gather(self.dim, self._kept(s[0]))
        return picked if self.keepdim else picked.squeeze(self.dim), None

    def _kept(self, x: Tensor) -> Tensor:
        return x if self.keepdim else x.unsqueeze(self.dim)

    def layout(self, layouts: Layouts) -> Layout | None:
        at = super().layout(layouts)
        return at if at is None or self.keepdim or at.axis < self.dim else Layout(at.axis - 1, at.block)


class Amax(Sum):
    """Maximum; equal maxima share the gradient."""

    names = ("AmaxBackward0", "AminBackward0")
    saved, origins, constants = ("self", "result"), (0, -1), ("dim", "keepdim")

    def back(self, c: Tensor, *s: Any) -> Tensor:
        winners = self._winners(*s)
        return winners * self._kept(c)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return (self._winners(*s) * t).sum(self.dims, self.keepdim)

    def _winners(self, x: Tensor, y: Tensor) -> Tensor:
        winners = (x == self._kept(y)).to(x.dtype)
        return winners / winners.sum(self.dims, True)


class MaxAll(Amax):
    names = ("MaxBackward1", "MinBackward1")
    constants = ()


RULES: tuple[type[Rule], ...] = (
    Index,
    Gather,
    IndexSelect,
    IndexAdd,
    ScatterAdd,
    Picked,
    Embedding,
    Sum,
    SumAll,
    Mean,
    MeanAll,
    MaxAlong,
    Amax,
    MaxAll,
)
