"""Padding, pooling and resampling of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.critic.rules.base import Layout, Layouts, Mixed, Rule, Saved, Shapes, Tensors, Wanted
from gpkernels.critic.rules.shapes import Moving
from gpkernels.ops.grid_sample import BILINEAR, NEAREST, ZEROS, Around, Constants
from gpkernels.ops.mean_pool import mean_pool_backward_op, mean_pool_op

aten = torch.ops.aten


class Spatial(Moving):
    """Linear map of images that keeps the axes of samples and channels."""

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
    sends = True
    saved, origins, constants = ("self",), (0,), ("padding",)
    forward, backward = aten.reflection_pad2d, aten.reflection_pad2d_backward

    def set_up(self, padding: tuple[int, ...]) -> None:
        self.padding = list(padding)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return type(self).backward(c, s[0], self.padding)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return type(self).forward(t, self.padding)


class ReflectionPad1d(ReflectionPad):
    names = ("ReflectionPad1DBackward0",)
    spatial = 1
    forward, backward = aten.reflection_pad1d, aten.reflection_pad1d_backward


class ReflectionPad3d(ReflectionPad):
    names = ("ReflectionPad3DBackward0",)
    spatial = 3
    forward, backward = aten.reflection_pad3d, aten.reflection_pad3d_backward


class ReplicationPad(ReflectionPad):
    names = ("ReplicationPad2DBackward0",)
    forward, backward = aten.replication_pad2d, aten.replication_pad2d_backward


class ReplicationPad1d(ReflectionPad1d):
    names = ("ReplicationPad1DBackward0",)
    forward, backward = aten.replication_pad1d, aten.replication_pad1d_backward


class ReplicationPad3d(ReflectionPad3d):
    names = ("ReplicationPad3DBackward0",)
    forward, backward = aten.replication_pad3d, aten.replication_pad3d_backward


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
    """Average pooling. Windows that tile the image, as in most critics, use the op mean_pool: ATen's is slow."""

    names = ("AvgPool2DBackward0",)
    sends = True
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
            return mean_pool_backward_op(c, *self.window)
        return aten.avg_pool2d_backward(c, s[0], *self.options)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return mean_pool_op(t, *self.window) if self.window else aten.avg_pool2d(t, *self.options)


class AdaptiveAvgPool(Spatial):
    names = ("AdaptiveAvgPool2DBackward0",)
    sends = True
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
    """Max pooling at known indices: the VJP scatters to them, the JVP gathers from them."""

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


class GridSample(Rule):
    """Pixels at the points of a grid: linear in the image, curved in the grid."""

    names = ("GridSampler2DBackward0", "GridSampler3DBackward0")
    saved, origins = ("input", "grid"), (0, 1)
    constants = ("interpolation_mode", "padding_mode", "align_corners")

    def set_up(self, mode: int, padding: int, align_corners: bool) -> None:
        self.given = Constants(mode, padding, align_corners)
        spatial = len(self.outputs[0].shape) - 2
        self._sample = aten.grid_sampler_2d if spatial == 2 else aten.grid_sampler_3d
        self._backward = aten.grid_sampler_2d_backward if spatial == 2 else aten.grid_sampler_3d_backward

    def curved(self, moving: Sequence[bool]) -> bool:
        return moving[1] and self.given.mode != NEAREST

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        return self.curved(moving), moving[0] or self.given.mode != NEAREST

    def _around(self, s: Saved) -> Around:
        if "around" not in s.notes:
            s.notes["around"] = Around(s[0], s[1], self.given)
        return s.notes["around"]

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        mask = [bool(w) for w in wanted]
        found = self._backward(c[0], *s, *self.given, mask)
        return [u if w else None for u, w in zip(found, mask, strict=True)]

    def push(self, s: Saved, t: Tensors) -> Tensors:
        of_image, of_grid = t
        pushed = None if of_image is None else self._sample(of_image, s[1], *self.given)
        along = None if of_grid is None else self._around(s).push(of_grid)
        return (along if pushed is None else pushed if along is None else pushed + along,)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        (of_image, of_grid), cotangent = t, c[0]
        if cotangent is None:
            return None, None
        to_image = to_grid = None
        if of_grid is not None:
            around = self._around(s)
            to_image = around.to_input(cotangent, of_grid) if wanted[0] else None
            to_grid = around.to_grid(cotangent, of_grid) if wanted[1] else None
            s.notes.pop("around")
        if of_image is not None and wanted[1]:
            _, mixed = self._backward(cotangent, of_image, s[1], *self.given, [False, True])
            to_grid = mixed if to_grid is None else to_grid + mixed
        return to_image, to_grid

    def layout(self, layouts: Layouts) -> Layout | None:
        image, grid = layouts
        at = image or grid
        if at is not None and (at.axis or (grid or at) != at):
            raise Mixed
        return at

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [out, out]  # a grid or an image that is constant has a row for each sample, too


class GridSampleOfCudnn(GridSample):
    """cuDNN's kernel, which PyTorch calls for bilinear sampling of images with aligned corners."""

    names = ("CudnnGridSamplerBackward0",)
    saved, constants = ("self", "grid"), ()

    def set_up(self, *constants: Any) -> None:
        super().set_up(BILINEAR, ZEROS, True)


class AffineGrid(Moving):
    names = ("AffineGridGeneratorBackward0",)
    constants = ("size", "align_corners")

    def set_up(self, size: tuple[int, ...], align_corners: bool) -> None:
        self.size, self.align_corners = list(size), align_corners

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten.affine_grid_generator_backward(c, [len(c), *self.size[1:]], self.align_corners)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return aten.affine_grid_generator(t, [len(t), *self.size[1:]], self.align_corners)

    def layout(self, layouts: Layouts) -> Layout | None:
        at = layouts[0]
        if at is not None and at.axis:
            raise Mixed
        return at


RULES: tuple[type[Rule], ...] = (
    *(ReflectionPad1d, ReflectionPad3d, ReplicationPad1d, ReplicationPad3d),
    *(Pad, ReflectionPad, ReplicationPad, PixelShuffle, PixelUnshuffle, Unfold, AvgPool, AdaptiveAvgPool),
    *(Upsample, UpsampleBilinear, UpsampleBicubic, MaxPool, MaxPool3d, GridSample, GridSampleOfCudnn),
    AffineGrid,
)
