"""Variances, standard deviations and the 2-norm of groups of elements, with their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gpkernels.critic.rules.base import Rule, Saved, Tensors, Unfit, Wanted
from gpkernels.critic.rules.reductions import Sum


class Var(Sum):
    names = ("VarBackward0",)
    saved, origins = ("self",), (0,)
    constants = ("dim", "correction", "keepdim")
    sends = True

    def set_up(self, dim: Any, correction: float | None, keepdim: bool) -> None:  # type: ignore[override]
        super().set_up(dim, keepdim)
        self.degrees = max(self.count - (1 if correction is None else correction), 0)
        if not self.degrees:
            raise Unfit("no degrees of freedom")

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
    """Variance and mean, two outputs."""

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
    """y = |x - m| / sqrt(degrees), with gradient 0 where y = 0; m is the mean or 0."""

    saved, origins = ("self", "result"), (0, -1)
    sends = True
    degrees: float = 1

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def _centred(self, x: Tensor) -> Tensor:
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        """Compute 1 / (degrees y), 0 where y = 0."""
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
            raise Unfit("no degrees of freedom")

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(self.dims, True)


class VectorNorm(Root):
    """The 2-norm; other orders are left to autograd."""

    names = ("LinalgVectorNormBackward0",)
    constants = ("dim", "ord", "keepdim")

    def set_up(self, dim: Any, order: float, keepdim: bool) -> None:  # type: ignore[override]
        super().set_up(dim, keepdim)
        if order != 2:
            raise Unfit("its order is not 2")


RULES: tuple[type[Rule], ...] = (Var, VarMean, Std, VectorNorm)
