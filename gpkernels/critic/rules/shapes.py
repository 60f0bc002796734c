"""What moves values without changing them: views, reshapes, parts and joints, sums and means, pooling, resampling."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels import ops
from gpkernels.critic.rules.base import Layout, Layouts, Linear, Mixed, Rule, Saved, Shapes, Tensors, Unfit, Wanted

aten = torch.ops.aten


class Moving(Linear):
    """A linear map of one argument; ``shape`` and ``dims`` of the argument and the output as they are."""

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


class Along(Moving):
    """Acts within some axes, which must not be the samples'; the other axes keep their place."""

    def axes(self) -> set[int]:
        """Of the argument."""
        raise NotImplementedError

    def layout(self, layouts: Layouts) -> Layout | None:
        at = layouts[0]
        if at is not None and at.axis in self.axes():
            raise Mixed
        return at


class Expand(Moving):
    names = ("ExpandBackward0",)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return c  # the passes sum it

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

    def _bounds(self) -> tuple[int, int, int]:
        axis, start, end, step = self.part
        return 0 if start is None else start, self.shape[axis] if end is None else end, step


class Select(Along):
    names = ("SelectBackward0",)
    constants = ("dim", "index")

    def set_up(self, dim: int, index: int) -> None:
        self.part = self.axis(dim), index

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
    """Several outputs; those that nobody read have no cotangent."""

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
    """Arguments without an axis, which PyTorch passes over, are left to autograd."""

    names = ("CatBackward0",)
    constants = ("dim",)
    stacks = False

    def set_up(self, dim: int) -> None:
        (output,) = self.outputs
        self.dim = dim % len(output.shape)
        self.lengths = [1] * len(self.inputs)
        if self.stacks:
            return
        # How long constants are is not in the graph, but what is left of the output must be theirs.
        known = [x for x in self.inputs if x is not None]
        if len(known) < len(self.inputs) - 1 or any(len(x.shape) != len(output.shape) for x in known):
            raise Unfit("parts of unknown lengths")
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
        found = {at for at in layouts if at is not None}
        if not found:
            return None
        if len(found) > 1:
            raise Mixed
        (at,) = found
        if self.stacks:
            return Layout(at.axis + (at.axis >= self.dim), at.block)
        if at.axis == self.dim:
            raise Mixed
        return at


class Stack(Cat):
    names = ("StackBackward0",)
    stacks = True


# --- picked by indices ------------------------------------------------------------------------------------------------


class Index(Rule):
    names = ("IndexBackward0",)
    saved, origins = ("indices",), ()

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, cotangent = self.inputs[0], c[0]
        assert x is not None
        assert cotangent is not None
        zeros = cotangent.new_zeros(x.shape)
        return (aten._index_put_impl_(zeros, list(s), cotangent, True, True),)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return (aten.index(t[0], list(s)),)


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


class Embedding(Rule):
    """Of a trained table: nothing else moves."""

    names = ("EmbeddingBackward0",)
    saved, origins = ("indices",), (-1,)
    constants = ("padding_idx", "scale_grad_by_freq", "sparse", "weight_sym_argsize_0")

    def set_up(self, padding: int, by_frequency: bool, sparse: bool, entries: int) -> None:
        self.padding, self.by_frequency, self.sparse, self.entries = padding, by_frequency, sparse, entries

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        options = (self.entries, self.padding, self.by_frequency, self.sparse)
        return (aten.embedding_backward(c[0], s[0], *options),)


# --- sums, means ------------------------------------------------------------------------------------------------------


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
        """With the axes that were summed away."""
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


# --- images -----------------------------------------------------------------------------------------------------------


class Spatial(Moving):
    """Samples and channels keep their axes."""

    spatial = 2

    def layout(self, layouts: Layouts) -> Layout | None:
        at = layouts[0]
        if at is not None and at.axis >= len(self.shape) - self.spatial:
            raise Mixed
        return at


class Pad(Spatial):
    names = ("ConstantPadNdBackward0",)
    constants = ("pad",)

    def set_up(self, pad: tuple[int, ...]) -> None:
        self.pad = list(pad)
        self.spatial = len(pad) // 2

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten.constant_pad_nd(c, [-n for n in self.pad], 0)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return aten.constant_pad_nd(t, self.pad, 0)


class ReflectionPad(Spatial):
    names = ("ReflectionPad2DBackward0",)
    saved, origins, constants = ("self",), (0,), ("padding",)
    forward, backward = aten.reflection_pad2d, aten.reflection_pad2d_backward

    def set_up(self, padding: tuple[int, ...]) -> None:
        self.padding = list(padding)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return type(self).backward(c, s[0], self.padding)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return type(self).forward(t, self.padding)


class ReplicationPad(ReflectionPad):
    names = ("ReplicationPad2DBackward0",)
    forward, backward = aten.replication_pad2d, aten.replication_pad2d_backward


class PixelShuffle(Spatial):
    names = ("PixelShuffleBackward0",)
    constants = ("upscale_factor",)
    spatial = 3

    def set_up(self, factor: int) -> None:
        self.factor = factor

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return F.pixel_unshuffle(c, self.factor)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return F.pixel_shuffle(t, self.factor)


class PixelUnshuffle(PixelShuffle):
    names = ("PixelUnshuffleBackward0",)
    constants = ("downscale_factor",)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return F.pixel_shuffle(c, self.factor)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return F.pixel_unshuffle(t, self.factor)


class Unfold(Spatial):
    names = ("Im2ColBackward0",)
    constants = ("kernel_size", "dilation", "padding", "stride")
    spatial = 3

    def set_up(self, *geometry: Any) -> None:
        self.geometry = [list(g) for g in geometry]

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten.col2im(c, list(self.shape[-2:]), *self.geometry)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return aten.im2col(t, *self.geometry)


class AvgPool(Spatial):
    """Windows that tile the image, as critics have them, go to a kernel of their own: PyTorch's general one is slow."""

    names = ("AvgPool2DBackward0",)
    saved, origins = ("self",), (0,)
    constants = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

    def set_up(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], *options: Any) -> None:
        window = tuple(kernel) * (3 - len(kernel))
        tiles = tuple(stride or kernel) * (3 - len(stride or kernel)) == window and set(padding) == {0}
        fits = len(self.shape) == 4 and all(n % k == 0 for n, k in zip(self.shape[-2:], window, strict=True))
        self.window = window if tiles and fits and options[-1] is None else None
        self.options = [list(kernel), list(stride), list(padding), *options]

    def back(self, c: Tensor, *s: Any) -> Tensor:
        if self.window:
            return ops.mean_pool_backward(c, *self.window)
        return aten.avg_pool2d_backward(c, s[0], *self.options)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return ops.mean_pool(t, *self.window) if self.window else aten.avg_pool2d(t, *self.options)


class AdaptiveAvgPool(Spatial):
    names = ("AdaptiveAvgPool2DBackward0",)
    saved, origins = ("self",), (0,)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten._adaptive_avg_pool2d_backward(c, s[0])

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return aten._adaptive_avg_pool2d(t, list(self.after[-2:]))


class Upsample(Spatial):
    names = ("UpsampleNearest2DBackward0",)
    constants = ("output_size", "scales_h", "scales_w")
    forward, backward = aten.upsample_nearest2d, aten.upsample_nearest2d_backward

    def set_up(self, size: tuple[int, ...], *options: Any) -> None:
        self.options = options

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return type(self).backward(c, list(self.after[2:]), list(self.shape), *self.options)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return type(self).forward(t, list(self.after[2:]), *self.options)


class UpsampleBilinear(Upsample):
    names = ("UpsampleBilinear2DBackward0",)
    constants = ("output_size", "align_corners", "scales_h", "scales_w")
    forward, backward = aten.upsample_bilinear2d, aten.upsample_bilinear2d_backward


class UpsampleBicubic(UpsampleBilinear):
    names = ("UpsampleBicubic2DBackward0",)
    forward, backward = aten.upsample_bicubic2d, aten.upsample_bicubic2d_backward


class MaxPool(Spatial):
    """The winners' places are known: going back scatters to them, going forth gathers from them."""

    names = ("MaxPool2DWithIndicesBackward0", "AdaptiveMaxPool2DBackward0")
    saved, origins = ("result1",), (-1,)
    sends = True

    def back(self, c: Tensor, *s: Any) -> Tensor:
        zeros = c.new_zeros(self.shape)
        zeros.flatten(-self.spatial).scatter_add_(-1, s[0].flatten(-self.spatial), c.flatten(-self.spatial))
        return zeros

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        places = s[0]
        return t.flatten(-self.spatial).gather(-1, places.flatten(-self.spatial)).reshape(places.shape)


class MaxPool3d(MaxPool):
    names = ("MaxPool3DWithIndicesBackward0", "AdaptiveMaxPool3DBackward0")
    spatial = 3


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
    """Where several are the largest, they share alike."""

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
    *(View, Squeeze, T, Transpose, Permute, Expand, Slice, Select, Flip, Roll, Tril, Triu, Cumsum, Repeat),
    *(Split, SplitWithSizes, Unbind, Cat, Stack, Index, Gather, IndexSelect, Embedding, Sum, SumAll, Mean, MeanAll),
    *(Pad, ReflectionPad, ReplicationPad, PixelShuffle, PixelUnshuffle, Unfold, AvgPool, AdaptiveAvgPool),
    *(Upsample, UpsampleBilinear, UpsampleBicubic, MaxPool, MaxPool3d, MaxAlong, Amax, MaxAll),
)
