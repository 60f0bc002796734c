"""Smooth elementwise functions of one argument, with their curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Rule, Saved, Tensors, Unary

aten = torch.ops.aten


class Smooth(Unary):
    def curved(self, moving: Sequence[bool]) -> bool:
        return True


class Tanh(Smooth):
    names = ("TanhBackward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return aten.tanh_backward(c, y)

    def bent(self, u: Tensor, y: Tensor) -> Tensor:
        return aten.tanh_backward(u * -2, y) * y

    def turned(self, base: Tensor, q: Tensor, y: Tensor) -> None:
        base.addcmul_(q, y, value=-2)


class Sigmoid(Smooth):
    names = ("SigmoidBackward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return aten.sigmoid_backward(c, y)

    def bent(self, u: Tensor, y: Tensor) -> Tensor:
        return aten.sigmoid_backward(u, y) * (1 - 2 * y)

    def turned(self, base: Tensor, q: Tensor, y: Tensor) -> None:
        base.add_(q).addcmul_(q, y, value=-2)


class SiLU(Smooth):
    names = ("SiluBackward0",)
    saved, origins = ("self",), (0,)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = x.sigmoid()
        y, less = x * s, s - 1
        slope = torch.addcmul(s, y, less, value=-1)
        return slope, torch.sub(y, slope, alpha=2).mul_(less)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.silu_backward(c, x)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        s = x.sigmoid()
        return aten.sigmoid_backward(u, s) * (2 + x * (1 - 2 * s))


class Mish(Smooth):
    """y = x tanh(softplus x); with h = softplus, f' = w + x w' and f'' = 2 w' + x w'' of w = tanh h."""

    names = ("MishBackward0",)
    saved, origins = ("self",), (0,)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, w = x.sigmoid(), torch.nn.functional.softplus(x).tanh()
        first = (1 - w * w) * s
        return w + x * first, 2 * first + x * first * (1 - s - 2 * w * s)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.mish_backward(c, x)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        s, w = x.sigmoid(), torch.nn.functional.softplus(x).tanh()
        first = (1 - w * w) * s
        second = first * (1 - s - 2 * w * s)
        return u * (2 * first + x * second)


class GELU(Smooth):
    names = ("GeluBackward0",)
    saved, origins, constants = ("self",), (0,), ("approximate",)

    def set_up(self, kind: str) -> None:
        self.kind = kind

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.gelu_backward(c, x, approximate=self.kind)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        square, k = x * x, math.sqrt(2 / math.pi)
        if self.kind != "tanh":  # f'' = k (1 - x^2 / 2) exp(-x^2 / 2)
            bell = (square * -0.5).exp_()
            return (u * bell.addcmul_(square, bell, value=-0.5)).mul_(k)
        # With t = tanh h for a cubic polynomial h, f'' = (1 - t^2) (h' + x h'' / 2 - x t h'^2).
        cubic = 0.044715 * k
        first = (square * (3 * cubic)).add_(k)
        t = (square * cubic).add_(k).mul_(x).tanh_()
        return u * (square * (6 * cubic)).add_(k).addcmul_(x * first, t * first, value=-1).mul_(1 - t * t)


class ELU(Smooth):
    names = ("EluBackward0",)
    saved, origins, constants = ("self",), (0,), ("alpha", "scale", "input_scale")
    of_output = False

    def set_up(self, alpha: float, scale: float, input_scale: float) -> None:
        self.alpha, self.scale, self.input_scale = alpha, scale, input_scale

    def slope(self, c: Tensor, saved: Tensor) -> Tensor:
        return aten.elu_backward(c, self.alpha, self.scale, self.input_scale, self.of_output, saved)

    def bent(self, u: Tensor, saved: Tensor) -> Tensor:
        if self.of_output:
            curve = (saved + self.alpha * self.scale) * self.input_scale**2
        else:
            curve = (saved.clamp(max=0) * self.input_scale).exp() * (self.alpha * self.scale * self.input_scale**2)
        return torch.where(saved > 0, 0, u * curve)


class ELUInPlace(ELU):
    names = ("EluBackward1",)
    saved, origins = ("result",), (-1,)
    of_output = True


class CELU(Smooth):
    names = ("CeluBackward0",)
    saved, origins, constants = ("self",), (0,), ("alpha",)

    def set_up(self, alpha: float) -> None:
        self.alpha = alpha
        self.inverse = 1 / torch.tensor(alpha, dtype=torch.float32).item()  # PyTorch's constant

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.elu_backward(c, self.alpha, 1, self.inverse, False, x)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 0, 0, u * (x.clamp(max=0) * self.inverse).exp() * (self.alpha * self.inverse**2))


ROUNDS_TO_ONE = 18  # above, a sigmoid is 1 in float32


class Softplus(Smooth):
    """Softplus; the identity beyond the threshold."""

    names = ("SoftplusBackward0",)
    saved, origins, constants = ("self",), (0,), ("beta", "threshold")

    def set_up(self, beta: float, threshold: float) -> None:
        self.beta = self.bend_by = beta
        self.threshold = threshold

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = x if self.beta == 1 else x * self.beta
        slope = inner.sigmoid()
        if x.dtype == torch.float64 or self.threshold < ROUNDS_TO_ONE:
            slope.masked_fill_(inner > self.threshold, 1)
        return slope, torch.addcmul(slope, slope, slope, value=-1)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.softplus_backward(c, x, self.beta, self.threshold)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        inner = x * self.beta
        s = inner.sigmoid()
        return aten.sigmoid_backward(u, s).mul_(self.beta).masked_fill_(inner > self.threshold, 0)


class Hardswish(Smooth):
    names = ("HardswishBackward0",)
    saved, origins = ("self",), (0,)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.hardswish_backward(c, x)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.where((x > -3) & (x < 3), u / 3, 0)


class LogSigmoid(Smooth):
    """f' = sigmoid(-x)."""

    names = ("LogSigmoidBackward0",)
    saved, origins = ("self",), (0,)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c * (-x).sigmoid()

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -aten.sigmoid_backward(u, x.sigmoid())


class Exp(Smooth):
    names = ("ExpBackward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return c * y

    bent = slope

    def turned(self, base: Tensor, q: Tensor, y: Tensor) -> None:
        base.add_(q)


class Expm1(Smooth):
    names = ("Expm1Backward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return c * (y + 1)

    bent = slope


class Log(Smooth):
    names = ("LogBackward0",)
    saved, origins = ("self",), (0,)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c / x

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -u / (x * x)


class Log1p(Log):
    names = ("Log1PBackward0",)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c / (x + 1)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -u / (x + 1).square()


class Sqrt(Smooth):
    names = ("SqrtBackward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return c / (2 * y)

    def bent(self, u: Tensor, y: Tensor) -> Tensor:
        return u / (-4 * y * y * y)


class Rsqrt(Smooth):
    names = ("RsqrtBackward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return c * (-0.5 * y * y * y)

    def bent(self, u: Tensor, y: Tensor) -> Tensor:
        return u * (0.75 * y.pow(5))


class Reciprocal(Smooth):
    names = ("ReciprocalBackward0",)
    saved, origins = ("result",), (-1,)

    def slope(self, c: Tensor, y: Tensor) -> Tensor:
        return -c * (y * y)

    def bent(self, u: Tensor, y: Tensor) -> Tensor:
        return u * (2 * y * y * y)


class Sin(Smooth):
    names = ("SinBackward0",)
    saved, origins = ("self",), (0,)
    lasts = True

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos(), x.sin().neg_()

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c * x.cos()

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -u * x.sin()


class Cos(Smooth):
    names = ("CosBackward0",)
    saved, origins = ("self",), (0,)
    lasts = True

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin().neg_(), x.cos().neg_()

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return -c * x.sin()

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -u * x.cos()


class Atan(Smooth):
    names = ("AtanBackward0",)
    saved, origins = ("self",), (0,)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c / (x * x + 1)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -2 * u * x / (x * x + 1).square()


class Erf(Smooth):
    names = ("ErfBackward0",)
    saved, origins = ("self",), (0,)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c * (2 / math.sqrt(math.pi)) * torch.exp(-x * x)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -2 * x * self.slope(u, x)


class Power(Smooth):
    """x to a constant exponent; 0 for the exponents 0 (and, in the second derivative, 1) whatever x is."""

    names = ("PowBackward0",)
    saved, origins, constants = ("self",), (0,), ("exponent",)

    def set_up(self, exponent: float) -> None:
        self.exponent = exponent
        self.flat = exponent == 0

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        return (not self.flat,)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return (None,) if self.flat else super().push(s, t)

    def curved(self, moving: Sequence[bool]) -> bool:
        return self.exponent not in (0, 1)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        p = self.exponent
        return torch.zeros_like(c) if p == 0 else c * (x if p == 2 else x.pow(p - 1)) * p

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        p = self.exponent
        if p == 2:
            return u * 2
        return torch.zeros_like(u) if p in (0, 1) else u * (p * (p - 1)) * x.pow(p - 2)


RULES: tuple[type[Rule], ...] = (
    *(Tanh, Sigmoid, SiLU, Mish, GELU, ELU, ELUInPlace, CELU, Softplus, Hardswish, LogSigmoid, Exp, Expm1),
    *(Log, Log1p, Sqrt, Rsqrt, Reciprocal, Sin, Cos, Atan, Erf, Power),
)
