"""Layer, group, batch and weight normalisation, with their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

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
    Unfit,
    Wanted,
)
from gpkernels.ops.affine_gradients import affine_gradients_op
from gpkernels.ops.normalise_curvature import normalise_curvature_op

aten = torch.ops.aten


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of an image; contiguous for anything else."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class Normalise(Rule):
    """y = w n + b, n = (x - mean) r over groups of M entries; x as (R, G, M), mean and r as (R, G, 1).

    The Jacobian of n is symmetric, so the backward of a layer norm without weights is both VJP and JVP.
    """

    saved: tuple[str, ...] = ("input", "weight", "result1", "result2")
    origins: tuple[int, ...] = (0, 1, 0, 0)
    sends = True
    centred = True  # whether the mean is subtracted

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        return True, True, False

    def split(self, u: Tensor, s: Saved) -> Tensor:
        """Reshape to groups, in the memory order of the saved input."""
        raise NotImplementedError

    def join(self, u: Tensor, s: Saved) -> Tensor:
        """Undo ``split``."""
        return u.reshape(s[0].shape)

    def spread(self, w: Tensor) -> Tensor:
        """Reshape a weight for broadcasting against x."""
        return w

    def sums(self, c: Tensor, operand: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of weight and bias: sums of c * operand and of c."""
        return c * operand if weight else None, c if bias else None

    def _parts(self, s: Saved) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return input, mean (None if not centred) and 1 / deviation, by group."""
        if "parts" not in s.notes:
            grouped = self.split(s[0], s).contiguous()
            s.notes["parts"] = grouped, *(u.to(grouped.dtype).reshape(*grouped.shape[:2], 1) for u in s[2:4])
        return s.notes["parts"]

    def _normal(self, s: Saved) -> Tensor:
        if "normal" not in s.notes:
            grouped, mean, inverse = self._parts(s)
            s.notes["normal"] = (grouped if mean is None else grouped - mean) * inverse
        return s.notes["normal"]

    def _scaled(self, u: Tensor, s: Saved) -> Tensor:
        return u if s[1] is None else u * self.spread(s[1])

    def _jacobian(self, u: Tensor, s: Saved) -> Tensor:
        grouped, mean, inverse = self._parts(s)
        there = self.split(u, s).to(grouped.dtype).contiguous()
        mask, shape = [True, False, False], [grouped.shape[-1]]
        back = aten.native_layer_norm_backward(there, grouped, shape, mean, inverse, None, None, mask)[0]
        return self.join(back, s)

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def push(self, s: Saved, t: Tensors) -> Tensors:
        x, weight, bias = t
        parts = []
        if x is not None:
            s.notes["pushed"] = self._jacobian(x, s)
            parts.append(self._scaled(s.notes["pushed"], s))
        if weight is not None:
            parts.append(self.join(self._normal(s), s) * self.spread(weight))
        if bias is not None:
            parts.append(self.spread(bias))
        return (sum(parts[1:], parts[0]),)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        x, weight, _ = t
        cotangent = c[0]
        assert cotangent is not None
        to_x = to_weight = None
        if wanted[0] and x is not None:
            inverse = self._parts(s)[2]
            pair = [self.split(u, s).to(inverse.dtype) for u in (x, self._scaled(cotangent, s))]
            to_x = self.join(normalise_curvature_op(self._normal(s), inverse, *pair, self.centred), s)
        if wanted[0] and weight is not None:
            more = self._jacobian(cotangent * self.spread(weight), s)
            to_x = more if to_x is None else to_x + more
        if wanted[1] and x is not None:
            pushed = s.notes.pop("pushed", None)
            to_weight = self.sums(cotangent, self._jacobian(x, s) if pushed is None else pushed, True, False)[0]
        return to_x, to_weight, None


class LayerNorm(Normalise):
    names = ("NativeLayerNormBackward0",)
    saved = ("input", "weight", "result1", "result2", "bias")
    origins = (0, 1, 0, 0, 2)
    constants = ("normalized_shape",)

    def set_up(self, shape: tuple[int, ...]) -> None:
        self.shape = list(shape)
        self.entries = prod(shape)

    def split(self, u: Tensor, s: Saved) -> Tensor:
        return u.reshape(1, -1, self.entries)

    def sums(self, c: Tensor, operand: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        rows = (u.to(c.dtype).reshape(-1, self.entries, 1) for u in (c, operand))
        to_weight, to_bias = (u.reshape(self.shape) for u in affine_gradients_op(*rows))
        return to_weight if weight else None, to_bias if bias else None

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, weight, mean, inverse, bias = s
        cotangent = c[0]
        given = (cotangent.contiguous(), x.contiguous())  # type: ignore[union-attr]
        return aten.native_layer_norm_backward(*given, self.shape, mean, inverse, weight, bias, list(wanted))

    def layout(self, layouts: Layouts) -> Layout | None:
        x, *rest = layouts
        if any(rest) or (x is not None and x.axis >= len(self.outputs[0].shape) - len(self.shape)):
            raise Mixed
        return x

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [out, None, out, out, None]

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        if row.inner % self.entries:
            raise Mixed
        of_statistics = row._replace(inner=row.inner // self.entries)
        shared: list[Rows | None] = [None] * (len(self.inputs) - 1)
        tensors = (row, None, of_statistics, of_statistics, None)
        return [row, *shared], tensors[: len(shapes)]


class RMSNorm(LayerNorm):
    """RMS norm, without mean and bias, where PyTorch has it as one operation, as on GPUs."""

    names = ("FusedRmsNormBackward0",)
    saved, origins = ("input", "weight", "result1"), (0, 1, 0)
    centred = False

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        return True, True

    def _parts(self, s: Saved) -> tuple[Tensor, Tensor | None, Tensor]:
        if "parts" not in s.notes:
            grouped = self.split(s[0], s).contiguous()
            s.notes["parts"] = grouped, None, s[2].to(grouped.dtype).reshape(*grouped.shape[:2], 1)
        return s.notes["parts"]

    def _jacobian(self, u: Tensor, s: Saved) -> Tensor:
        inverse = self._parts(s)[2]
        there, normal = self.split(u, s).to(inverse.dtype), self._normal(s)
        return self.join((there - normal * (there * normal).mean(-1, keepdim=True)) * inverse, s)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, weight, inverse = s
        cotangent = c[0]
        assert cotangent is not None
        if cotangent.is_cuda:
            given = cotangent.contiguous(), x.contiguous()
            return aten._fused_rms_norm_backward(*given, self.shape, inverse, weight, list(wanted[:2]))
        to_weight = self.sums(cotangent, self.join(self._normal(s), s), True, False)[0] if wanted[1] else None
        return self._jacobian(self._scaled(cotangent, s), s), to_weight

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return super().push(s, (*t, None))

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        return super().bend(s, (*t, None), c, wanted)[:2]

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [out, None, out]


class PerChannel(Normalise):
    """Normalisation with one weight for each channel, axis 1."""

    def spread(self, w: Tensor) -> Tensor:
        return w.reshape(1, -1, *[1] * (len(self.outputs[0].shape) - 2))

    def sums(self, c: Tensor, operand: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        channels, operand = c.shape[1], operand.to(c.dtype)
        if layout_of(c) is torch.channels_last:
            rows = [u.permute(0, 2, 3, 1).reshape(-1, channels, 1) for u in (c, operand)]
        else:
            rows = [u.reshape(u.shape[0], channels, -1) for u in (c, operand)]
        to_weight, to_bias = affine_gradients_op(*rows)
        return to_weight if weight else None, to_bias if bias else None


class GroupNorm(PerChannel):
    names = ("NativeGroupNormBackward0",)
    constants = ("group",)

    def set_up(self, groups: int) -> None:
        self.groups = groups

    def split(self, u: Tensor, s: Saved) -> Tensor:
        last = self.groups == 1 and layout_of(s[0]) is torch.channels_last
        return (u.permute(0, 2, 3, 1) if last else u).reshape(u.shape[0], self.groups, -1)

    def join(self, u: Tensor, s: Saved) -> Tensor:
        if self.groups > 1 or layout_of(s[0]) is not torch.channels_last:
            return u.reshape(s[0].shape)
        n, c, h, w = s[0].shape
        return u.reshape(n, h, w, c).permute(0, 3, 1, 2)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, weight, mean, inverse = s
        cotangent = c[0]
        assert x is not None
        assert cotangent is not None
        order = layout_of(x)
        x, cotangent = (u.contiguous(memory_format=order) for u in (x, cotangent))
        n, channels, *image = x.shape
        sizes = (n, channels, prod(image), self.groups)
        # PyTorch 2.13's kernel for channels last on CPUs writes the gradient at x even where it was not asked for it.
        mask = [wanted[0] or (x.is_cpu and order is torch.channels_last), *wanted[1:]]
        return aten.native_group_norm_backward(cotangent, x, mean, inverse, weight, *sizes, mask)

    def layout(self, layouts: Layouts) -> Layout | None:
        x, *rest = layouts
        if any(rest) or (x is not None and x.axis):
            raise Mixed
        return x

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [out, None, out, out]


class BatchNorm(PerChannel):
    """Batch norm, by batch or running statistics. Instance norm is this on one sample with all samples' channels."""

    names = ("NativeBatchNormBackward0", "NativeBatchNormLegitBackward0")
    saved = ("input", "weight", "result1", "result2", "running_mean", "running_var")
    origins = (0, 1, 0, 0, 0, 0)
    constants = ("training", "eps")

    def set_up(self, training: bool, eps: float) -> None:
        self.training, self.eps = training, eps

    def curved(self, moving: Sequence[bool]) -> bool:
        return self.training

    def split(self, u: Tensor, s: Saved) -> Tensor:
        return u.transpose(0, 1).reshape(1, u.shape[1], -1)

    def join(self, u: Tensor, s: Saved) -> Tensor:
        n, channels, *image = s[0].shape
        return u.reshape(channels, n, *image).transpose(0, 1)

    def _slopes(self, s: Saved) -> Tensor:
        return self.spread((s[5] + self.eps).rsqrt())

    def _jacobian(self, u: Tensor, s: Saved) -> Tensor:
        if not self.training:
            return u * self._slopes(s)
        options = (True, self.eps, [True, False, False])
        back: Tensor = aten.native_batch_norm_backward(*self._alike(u, s[0]), None, None, None, *s[2:4], *options)[0]
        return back

    @staticmethod
    def _alike(u: Tensor, x: Tensor) -> list[Tensor]:
        """Lay out a cotangent and the input alike: otherwise PyTorch 2.13 gives wrong numbers for a single sample."""
        return [v.to(x.dtype).contiguous(memory_format=layout_of(x)) for v in (u, x)]

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, weight, mean, inverse, *running = s
        ends = *(running or (None, None)), mean, inverse, self.training, self.eps, list(wanted)
        return aten.native_batch_norm_backward(*self._alike(c[0], x), weight, *ends)  # type: ignore[arg-type]

    def push(self, s: Saved, t: Tensors) -> Tensors:
        if self.training or t[1] is None:
            return super().push(s, t)
        raise Unfit("running statistics and a weight that depends on the input")

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        if self.training:
            return super().bend(s, t, c, wanted)
        x = t[0]
        to_weight = self.sums(c[0], self._jacobian(x, s), True, False)[0] if wanted[1] and x is not None else None  # type: ignore[arg-type]
        return None, to_weight, None

    def layout(self, layouts: Layouts) -> Layout | None:
        x, *rest = layouts
        if x is None or any(rest):
            raise Mixed
        (out,) = self.outputs
        one = x.axis == 1 and out.shape[0] == 1
        if not one and (x.axis or self.training):
            raise Mixed
        return x

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        by_channel = Layout(0, out.block) if out is not None and out.axis == 1 else None
        return [out, *[by_channel] * (len(shapes) - 1)]


class BatchNormAlone(BatchNorm):
    """Batch norm without running statistics, as in a compiler's graph."""

    names = ("NativeBatchNormLegitBackward1",)
    saved = ("input", "weight", "result1", "result2")
    origins = (0, 1, 0, 0)


class BatchNormInference(BatchNorm):
    """Batch norm by running statistics, as in a compiler's graph."""

    names = ("NativeBatchNormLegitNoTrainingBackward0",)
    constants = ("eps",)

    def set_up(self, eps: float) -> None:  # type: ignore[override]
        super().set_up(False, eps)


class CudnnBatchNorm(BatchNorm):
    """Batch norm by cuDNN, whose saved mean and deviation are PyTorch's."""

    names = ("CudnnBatchNormBackward0",)
    constants = ("training", "epsilon")


class WeightNorm(Rule):
    """w = g v / |v|, of weights alone."""

    names = ("WeightNormInterfaceBackward0",)
    saved, origins, constants = ("v", "g", "result1"), (0, 1, -1), ("dim",)

    def set_up(self, dim: int) -> None:
        self.dim = dim

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return aten._weight_norm_interface_backward(c[0].contiguous(), *s, self.dim)  # type: ignore[union-attr]


RULES: tuple[type[Rule], ...] = (
    *(LayerNorm, RMSNorm, GroupNorm),
    *(BatchNorm, BatchNormAlone, BatchNormInference, CudnnBatchNorm),
    WeightNorm,
)
