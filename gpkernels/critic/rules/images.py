"""Padding, pooling and resampling of images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.critic.rules.base import Layout, Layouts, Mixed, Rule
from gpkernels.critic.rules.shapes import Moving
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
    """Average pooling. Windows that tile the image, as in most critics, use the op mean_pool: ATen's is slow."""

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
            return mean_pool_backward_op(c, *self.window)
        return aten.avg_pool2d_backward(c, s[0], *self.options)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return mean_pool_op(t, *self.window) if self.window else aten.avg_pool2d(t, *self.options)


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


RULES: tuple[type[Rule], ...] = (
    *(Pad, ReflectionPad, ReplicationPad, PixelShuffle, PixelUnshuffle, Unfold, AvgPool, AdaptiveAvgPool),
    *(Upsample, UpsampleBilinear, UpsampleBicubic, MaxPool, MaxPool3d),
)
