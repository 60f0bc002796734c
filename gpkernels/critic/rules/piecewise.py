"""Piecewise-linear functions of one argument.

They have no second-order term; PyTorch's double backward sends exact zeros through the whole network for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Rule, Saved, Tensors, Unary

aten = torch.ops.aten


class ReLU(Unary):
    names = ("ReluBackward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return aten.threshold_backward(c, y, 0)


class Threshold(Unary):
    names = ("ThresholdBackward0", "ThresholdBackward1")
    saved, origins, constants = ("self",), (0,), ("threshold",)

    def set_up(self, threshold: float) -> None:
        self.threshold = threshold

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.threshold_backward(c, x, self.threshold)


class LeakyReLU(Unary):
    names = ("LeakyReluBackward0",)
    saved, origins, constants = ("self",), (0,), ("negative_slope",)
    of_output = False

    def set_up(self, negative: float) -> None:
        self.negative = negative

    def slope(self, c: Tensor, saved: Tensor) -> Tensor:
        return aten.leaky_relu_backward(c, saved, self.negative, self.of_output)


class LeakyReLUInPlace(LeakyReLU):
    names = ("LeakyReluBackward1",)
    saved, origins = ("result",), (-1,)
    of_output = True


class Hardtanh(Unary):
    names = ("HardtanhBackward0",)
    saved, origins, constants = ("self",), (0,), ("min_val", "max_val")

    def set_up(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.hardtanh_backward(c, x, self.low, self.high)


class Hardsigmoid(Unary):
    names = ("HardsigmoidBackward0",)
    saved, origins = ("self",), (0,)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.hardsigmoid_backward(c, x)


class Abs(Unary):
    names = ("AbsBackward0",)
    saved, origins = ("self",), (0,)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c * x.sgn()


class Clamp(Unary):
    """Clamp by numbers; at a bound the derivative is 1."""

    names = ("ClampBackward1",)
    saved, origins, constants = ("self",), (0,), ("min", "max")
    sends = False

    def set_up(self, low: float | None, high: float | None) -> None:
        self.low, self.high = low, high

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        inside = None
        if self.low is not None:
            inside = x >= self.low
        if self.high is not None:
            below = x <= self.high
            inside = below if inside is None else inside & below
        return c if inside is None else torch.where(inside, c, 0)


class ClampMin(Clamp):
    names = ("ClampMinBackward0",)
    constants = ("min",)

    def set_up(self, low: float, high: None = None) -> None:  # type: ignore[override]
        self.low, self.high = low, None


class ClampMax(Clamp):
    names = ("ClampMaxBackward0",)
    constants = ("max",)

    def set_up(self, high: float, low: None = None) -> None:  # type: ignore[override]
        self.low, self.high = None, high


class MaskedFill(Unary):
    names = ("MaskedFillBackward0",)
    saved, origins = ("mask",), (0,)
    sends = False

    def slope(self, c: Tensor, mask: Tensor) -> Tensor:
        return c.masked_fill(mask, 0)


class NativeDropout(Unary):
    """Dropout on a GPU. Its node does not show training mode to Python; ``graph.py`` reads it in C++."""

    names = ("NativeDropoutBackward0",)
    saved, origins, constants = ("result1",), (-1,), ("p",)

    def set_up(self, p: float) -> None:
        self.scale = 0.0 if p == 1 else 1 / (1 - p)

    def slope(self, c: Tensor, mask: Tensor) -> Tensor:
        return aten.native_dropout_backward(c, mask, self.scale)


class Negative(Unary):
    names = ("NegBackward0",)
    sends = False

    def slope(self, c: Tensor) -> Tensor:
        return -c


class Copy(Unary):
    """Copy, possibly to another dtype or device."""

    names = ("CloneBackward0", "ToCopyBackward0", "AliasBackward0")
    sends = False

    def slope(self, c: Tensor) -> Tensor:
        return c


class AddNumber(Copy):
    """Addition of a number; ``MulNumber`` and its kin are multiplications by one."""

    names = ("AddBackward1", "SubBackward1")


class SubtractFromNumber(Unary):
    names = ("RsubBackward1",)
    constants = ("alpha",)
    sends = False

    def set_up(self, alpha: float) -> None:
        self.alpha = alpha

    def slope(self, c: Tensor) -> Tensor:
        return c * -self.alpha


class MulNumber(Unary):
    names = ("MulBackward1",)
    constants = ("other",)
    sends = False

    def set_up(self, factor: float) -> None:
        self.factor = factor

    def slope(self, c: Tensor) -> Tensor:
        return c * self.factor


class DivNumber(MulNumber):
    names = ("DivBackward1",)

    def slope(self, c: Tensor) -> Tensor:
        return c / self.factor


class Flat(Unary):
    """Function that is constant almost everywhere: the VJP is zero, as in PyTorch, and there is no JVP."""

    names = ("SignBackward0", "SgnBackward0", "RoundBackward0", "FloorBackward0", "CeilBackward0", "TruncBackward0")
    flat = True
    sends = False

    def slope(self, c: Tensor) -> Tensor:
        return torch.zeros_like(c)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return (None,)


RULES: tuple[type[Rule], ...] = (
    *(ReLU, Threshold, LeakyReLU, LeakyReLUInPlace, Hardtanh, Hardsigmoid, Abs, Clamp, ClampMin, ClampMax),
    *(MaskedFill, NativeDropout, Negative, Copy, AddNumber, SubtractFromNumber, MulNumber, DivNumber, Flat),
)
