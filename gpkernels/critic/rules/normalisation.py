"""Norms, spreads and softmaxes: functions of groups of entries, with their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Layout, Layouts, Mixed, Rule, Saved, Shapes, Tensors, Unfit, Wanted
from gpkernels.critic.rules.reductions import Sum
from gpkernels.critic.rules.shapes import Along
from gpkernels.ops.affine_gradients import affine_gradients_op
from gpkernels.ops.normalise_curvature import normalise_curvature_op

aten = torch.ops.aten


def layout_of(x: Tensor) -> torch.memory_format:
    """The order of an image's axes in memory, contiguous for anything else."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class Normalise(Rule):
    """y = w n + b, n = (x - mean) r over groups of M entries; x as (R, G, M), mean and r as (R, G, 1).

    The Jacobian of n is symmetric, so the backward of a layer norm without weights goes both ways.
    """

    saved: tuple[str, ...] = ("input", "weight", "result1", "result2")
    origins: tuple[int, ...] = (0, 1, 0, 0)
    sends = True
    centred = True  # whether the mean is taken off

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        return True, True, False

    def split(self, u: Tensor, s: Saved) -> Tensor:
        """In groups, all in the order of the saved input."""
        raise NotImplementedError

    def join(self, u: Tensor, s: Saved) -> Tensor:
        return u.reshape(s[0].shape)

    def spread(self, w: Tensor) -> Tensor:
        """A weight as it is broadcast against x."""
        return w

    def sums(self, c: Tensor, operand: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias: sums of c * operand and of c."""
        return c * operand if weight else None, c if bias else None

    def _parts(self, s: Saved) -> tuple[Tensor, Tensor | None, Tensor]:
        """The input, the mean where it is taken off, and 1 / deviation, by group."""
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


class RMSNorm(LayerNorm):
    """Without a mean and a bias; where PyTorch has it as one operation, as on GPUs."""

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
    """Weights are one for each channel, axis 1."""

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
        return aten.native_group_norm_backward(cotangent, x, mean, inverse, weight, *sizes, list(wanted))

    def layout(self, layouts: Layouts) -> Layout | None:
        x, *rest = layouts
        if any(rest) or (x is not None and x.axis):
            raise Mixed
        return x

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        return [out, None, out, out]


class BatchNorm(PerChannel):
    """Over the batch, or by running statistics. Instance norm is this, of one sample that has all samples' channels."""

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
        # Where u and x are not laid out alike, PyTorch 2.13 gives wrong numbers for a single sample.
        there, x = (v.to(s[0].dtype).contiguous(memory_format=layout_of(s[0])) for v in (u, s[0]))
        options = (True, self.eps, [True, False, False])
        back: Tensor = aten.native_batch_norm_backward(there, x, None, None, None, *s[2:4], *options)[0]
        return back

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, weight, mean, inverse, *running = s
        options = (self.training, self.eps, list(wanted))
        return aten.native_batch_norm_backward(c[0], x, weight, *(running or (None, None)), mean, inverse, *options)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        if self.training or t[1] is None:
            return super().push(s, t)
        raise Unfit("a moving weight of a batch norm by running statistics")

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
    """The same without running statistics, as a compiler has it."""

    names = ("NativeBatchNormLegitBackward1",)
    saved = ("input", "weight", "result1", "result2")
    origins = (0, 1, 0, 0)


class CudnnBatchNorm(BatchNorm):
    """The same by cuDNN, whose saved mean and deviation are PyTorch's."""

    names = ("CudnnBatchNormBackward0",)
    constants = ("training", "epsilon")


# --- spreads and norms ------------------------------------------------------------------------------------------------


class Var(Sum):
    names = ("VarBackward0",)
    saved, origins = ("self",), (0,)
    constants = ("dim", "correction", "keepdim")
    sends = True

    def set_up(self, dim: Any, correction: float | None, keepdim: bool) -> None:  # type: ignore[override]
        super().set_up(dim, keepdim)
        self.degrees = max(self.count - (1 if correction is None else correction), 0)
        if not self.degrees:
            raise Unfit("a spread of too few entries")

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(self.dims, True)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return self._centred(s[0]) * (self._kept(c) * (2 / self.degrees))

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return (self._centred(s[0]) * t).sum(self.dims, self.keepdim) * (2 / self.degrees)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        if t[0] is None:
            return (None,)
        return (self._centred(t[0]) * (self._kept(c[0]) * (2 / self.degrees)),)  # type: ignore[arg-type]


class VarMean(Var):
    """Two outputs: the variance and the mean."""

    names = ("VarMeanBackward0",)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        parts = []
        if c[0] is not None:
            parts.append(self.back(c[0], *s))
        if c[1] is not None:
            parts.append((self._kept(c[1]) / self.count).expand(self.shape))
        return (parts[0] if len(parts) == 1 else parts[0] + parts[1],)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return self.forth(t[0], *s), t[0].mean(self.dims, self.keepdim)  # type: ignore[arg-type, union-attr]

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        return (None,) if c[0] is None else super().bend(s, t, c, wanted)


class Root(Sum):
    """y = |x - m| / sqrt(degrees), of which the gradient is taken as 0 where y is 0; m is the mean or 0."""

    saved, origins = ("self", "result"), (0, -1)
    sends = True
    degrees: float = 1

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def _centred(self, x: Tensor) -> Tensor:
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        """1 / (degrees y), 0 where y is."""
        return self._kept((1 / (y * self.degrees)).masked_fill(y == 0, 0))

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return self._centred(s[0]) * (self._kept(c) * self._inverse(s[1]))

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return (self._centred(s[0]) * t * self._inverse(s[1])).sum(self.dims, self.keepdim)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        x, y = s
        if t[0] is None:
            return (None,)
        centred, inverse = self._centred(x), self._inverse(y)
        along = (centred * t[0]).sum(self.dims, True) * inverse * inverse * self.degrees
        return ((self._centred(t[0]) - centred * along) * (self._kept(c[0]) * inverse),)  # type: ignore[arg-type]


class Std(Root):
    names = ("StdBackward0",)
    constants = ("dim", "correction", "keepdim")

    def set_up(self, dim: Any, correction: float | None, keepdim: bool) -> None:  # type: ignore[override]
        super().set_up(dim, keepdim)
        self.degrees = max(self.count - (1 if correction is None else correction), 0)
        if not self.degrees:
            raise Unfit("a spread of too few entries")

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(self.dims, True)


class VectorNorm(Root):
    """The 2-norm; others are left to autograd."""

    names = ("LinalgVectorNormBackward0",)
    constants = ("dim", "ord", "keepdim")

    def set_up(self, dim: Any, order: float, keepdim: bool) -> None:  # type: ignore[override]
        super().set_up(dim, keepdim)
        if order != 2:
            raise Unfit("a norm that is not the 2-norm")


# --- softmaxes --------------------------------------------------------------------------------------------------------


class Softmax(Along):
    """J u = y (u - sum y u)."""

    names = ("SoftmaxBackward0", "SafeSoftmaxBackward0")
    saved, origins, constants = ("result",), (-1,), ("dim",)
    sends = True

    def set_up(self, dim: int) -> None:
        self.dim = self.axis(dim)

    def axes(self) -> set[int]:
        return {self.dim}

    def _back(self, u: Tensor, y: Tensor) -> Tensor:
        return aten._softmax_backward_data(u, y, self.dim, y.dtype)

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return self._back(c, s[0])

    forth = back

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        y, tangent, cotangent = s[0], t[0], c[0]
        if tangent is None:
            return (None,)
        assert y is not None
        assert cotangent is not None
        along_t, along_c = ((y * u).sum(self.dim, True) for u in (tangent, cotangent))
        return (self._back(cotangent * tangent - cotangent * along_t - tangent * along_c, y),)


class LogSoftmax(Softmax):
    """J u = u - sum p u, with p = exp y; its transpose is u - p sum u."""

    names = ("LogSoftmaxBackward0",)

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten._log_softmax_backward_data(c, s[0], self.dim, s[0].dtype)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return t - (s[0].exp() * t).sum(self.dim, True)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        y, tangent, cotangent = s[0], t[0], c[0]
        if tangent is None:
            return (None,)
        assert y is not None
        assert cotangent is not None
        return (self._back(tangent, y.exp()) * -cotangent.sum(self.dim, True),)


class LogSumExp(Sum):
    names = ("LogsumexpBackward0",)
    saved, origins, constants = ("self", "result"), (0, -1), ("dim", "keepdim")
    sends = True

    def _weights(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - self._kept(y)).exp()

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return self._weights(*s) * self._kept(c)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        return (self._weights(*s) * t).sum(self.dims, self.keepdim)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        if t[0] is None:
            return (None,)
        weights = self._weights(*s)
        along = (weights * t[0]).sum(self.dims, True)
        return (weights * (t[0] - along) * self._kept(c[0]),)  # type: ignore[arg-type]


class GLU(Along):
    """y = a sigmoid(b), of the two halves of x."""

    names = ("GluBackward0",)
    saved, origins, constants = ("self",), (0,), ("dim",)
    sends = True

    def set_up(self, dim: int) -> None:
        self.dim = self.axis(dim)

    def axes(self) -> set[int]:
        return {self.dim}

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def back(self, c: Tensor, *s: Any) -> Tensor:
        return aten.glu_backward(c, s[0], self.dim)

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        (a, b), (ta, tb) = s[0].chunk(2, self.dim), t.chunk(2, self.dim)
        gate = b.sigmoid()
        return ta * gate + a * aten.sigmoid_backward(tb, gate)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        x, tangent, cotangent = s[0], t[0], c[0]
        if tangent is None:
            return (None,)
        assert x is not None
        assert cotangent is not None
        (a, b), (ta, tb) = x.chunk(2, self.dim), tangent.chunk(2, self.dim)
        gate = b.sigmoid()
        to_a = aten.sigmoid_backward(cotangent * tb, gate)
        to_b = aten.sigmoid_backward(cotangent, gate) * (ta + a * tb * (1 - 2 * gate))
        return (torch.cat([to_a, to_b], self.dim),)


# --- weights ----------------------------------------------------------------------------------------------------------


class WeightNorm(Rule):
    """w = g v / |v|, of weights alone."""

    names = ("WeightNormInterfaceBackward0",)
    saved, origins, constants = ("v", "g", "result1"), (0, 1, -1), ("dim",)

    def set_up(self, dim: int) -> None:
        self.dim = dim

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return aten._weight_norm_interface_backward(c[0].contiguous(), *s, self.dim)  # type: ignore[union-attr]


RULES: tuple[type[Rule], ...] = (
    *(LayerNorm, RMSNorm, GroupNorm, BatchNorm, BatchNormAlone, CudnnBatchNorm),
    *(Var, VarMean, Std, VectorNorm, Softmax, LogSoftmax, LogSumExp, GLU, WeightNorm),
)
