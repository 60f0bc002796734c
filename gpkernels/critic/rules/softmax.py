"""Softmax and its relatives, and the gated linear unit, with their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Mixed, Rows, RowsRead, Rule, Saved, Shapes, Tensors, Wanted
from gpkernels.critic.rules.reductions import Sum
from gpkernels.critic.rules.shapes import Along

aten = torch.ops.aten


class Softmax(Along):
    """J u = y (u - sum y u)."""

    names = ("SoftmaxBackward0", "SafeSoftmaxBackward0")
    saved, origins, constants = ("result",), (-1,), ("dim",)
    sends = True

    def set_up(self, dim: int) -> None:
        self.dim = self.axis(dim)

    def axes(self) -> set[int]:
        return {self.dim}

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        at = row.axis_of(self.after)
        if at is None or at[0] in self.axes():
            raise Mixed
        return [row], [row]

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
    """J u = u - sum p u, with p = exp y; its transpose is J^T u = u - p sum u."""

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
    """y = a sigmoid(b) for the halves (a, b) of x."""

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


RULES: tuple[type[Rule], ...] = (Softmax, LogSoftmax, LogSumExp, GLU)
