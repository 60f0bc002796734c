"""Functions of one argument, element by element.

Piecewise-linear ones do not bend; PyTorch's double backward sends exact zeros down the whole network for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Elementwise, Rule, Saved, Tensors, Unary, Wanted

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
    """Bounds are numbers; at a bound the derivative is 1."""

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


class Negative(Unary):
    names = ("NegBackward0",)
    sends = False

    def slope(self, c: Tensor) -> Tensor:
        return -c


class Copy(Unary):
    """A copy, perhaps in another dtype or on another device."""

    names = ("CloneBackward0", "ToCopyBackward0", "AliasBackward0")
    sends = False

    def slope(self, c: Tensor) -> Tensor:
        return c


class AddNumber(Copy):
    """A number is added; ``MulNumber`` and its kin: one is multiplied in."""

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
    """Constant almost everywhere: zeros go back, as in PyTorch, and nothing goes forth."""

    names = ("SignBackward0", "SgnBackward0", "RoundBackward0", "FloorBackward0", "CeilBackward0", "TruncBackward0")
    flat = True
    sends = False

    def slope(self, c: Tensor) -> Tensor:
        return torch.zeros_like(c)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return (None,)


# --- smooth ones ------------------------------------------------------------------------------------------------------


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
        rest = 1 - s
        return s * (1 + x * rest), s * rest * (2 + x * (rest - s))

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

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(x)
        return self.slope(one, x), self.bent(one, x)

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.gelu_backward(c, x, approximate=self.kind)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        if self.kind != "tanh":
            return u * (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        k, cubic = math.sqrt(2 / math.pi), 0.044715
        inner, first, second = k * (x + cubic * x * x * x), k * (1 + 3 * cubic * x * x), 6 * k * cubic * x
        t = inner.tanh()
        return u * (1 - t * t) * (first + 0.5 * x * (second - 2 * t * first * first))


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
        self.inverse = 1 / torch.tensor(alpha, dtype=torch.float32).item()  # as PyTorch has it

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return aten.elu_backward(c, self.alpha, 1, self.inverse, False, x)

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 0, 0, u * (x.clamp(max=0) * self.inverse).exp() * (self.alpha * self.inverse**2))


class Softplus(Smooth):
    """Beyond the threshold it is x."""

    names = ("SoftplusBackward0",)
    saved, origins, constants = ("self",), (0,), ("beta", "threshold")

    def set_up(self, beta: float, threshold: float) -> None:
        self.beta, self.threshold = beta, threshold

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = x * self.beta
        slope = inner.sigmoid().masked_fill_(inner > self.threshold, 1)
        return slope, (slope - slope * slope) * self.beta

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

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos(), -x.sin()

    def slope(self, c: Tensor, x: Tensor) -> Tensor:
        return c * x.cos()

    def bent(self, u: Tensor, x: Tensor) -> Tensor:
        return -u * x.sin()


class Cos(Smooth):
    names = ("CosBackward0",)
    saved, origins = ("self",), (0,)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return -x.sin(), -x.cos()

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
    """x to a constant exponent; 0 for the exponents 0 (and, bent, 1) whatever x is."""

    names = ("PowBackward0",)
    saved, origins, constants = ("self",), (0,), ("exponent",)

    def set_up(self, exponent: float) -> None:
        self.exponent = exponent
        self.flat = exponent == 0

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


# --- several arguments ------------------------------------------------------------------------------------------------


class Add(Elementwise):
    """y = x1 + alpha x2."""

    names = ("AddBackward0",)
    constants = ("alpha",)
    factors = (1.0, 1.0)

    def set_up(self, alpha: float) -> None:
        self.factors = (1.0, alpha)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return [None if not w else _times(c[0], f) for w, f in zip(wanted, self.factors, strict=True)]

    def push(self, s: Saved, t: Tensors) -> Tensors:
        first, second = t
        if first is None or second is None:
            return (_times(first, self.factors[0]) if second is None else _times(second, self.factors[1]),)
        return (torch.add(_times(first, self.factors[0]), second, alpha=self.factors[1]),)  # type: ignore[arg-type]


def _times(x: Tensor | None, factor: float) -> Tensor | None:
    return x if x is None or factor == 1 else x * factor


class Sub(Add):
    names = ("SubBackward0",)

    def set_up(self, alpha: float) -> None:
        self.factors = (1.0, -alpha)


class Rsub(Add):
    """y = x2 - alpha x1."""

    names = ("RsubBackward0",)

    def set_up(self, alpha: float) -> None:
        self.factors = (-alpha, 1.0)


class Mul(Elementwise):
    """A scalar factor is a tensor without axes."""

    names = ("MulBackward0",)
    saved, origins = ("self", "other"), (0, 1)

    def curved(self, moving: Sequence[bool]) -> bool:
        return all(moving)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        a, b = s
        return (c[0] * b if wanted[0] else None, c[0] * a if wanted[1] else None)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return (_sum(_product(t[0], s[1]), _product(s[0], t[1])),)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        return (_product(c[0], t[1]) if wanted[0] else None, _product(c[0], t[0]) if wanted[1] else None)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class Div(Elementwise):
    names = ("DivBackward0",)
    saved, origins = ("self", "other"), (0, 1)
    sends = True

    def curved(self, moving: Sequence[bool]) -> bool:
        return moving[1]

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        return moving[1], True

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        a, b = s
        to_first = c[0] / b
        return (to_first if wanted[0] else None, -to_first * (a / b) if wanted[1] else None)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        a, b = s
        first = None if t[0] is None else t[0] / b
        second = None if t[1] is None else t[1] * (-a / (b * b))
        return (_sum(first, second),)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        a, b = s
        square = b * b
        to_first = -c[0] * t[1] / square if wanted[0] and t[1] is not None else None  # type: ignore[operator]
        to_second = None
        if wanted[1]:
            first = None if t[0] is None else -c[0] * t[0] / square  # type: ignore[operator]
            second = None if t[1] is None else 2 * c[0] * t[1] * a / (square * b)  # type: ignore[operator]
            to_second = _sum(first, second)
        return to_first, to_second


class Chosen(Elementwise):
    """One of two arguments, element by element."""

    def share(self, s: Saved, u: Tensor, first: bool) -> Tensor:
        raise NotImplementedError

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return [self.share(s, c[0], i == 0) if w else None for i, w in enumerate(wanted)]  # type: ignore[arg-type]

    def push(self, s: Saved, t: Tensors) -> Tensors:
        shares = [None if u is None else self.share(s, u, i == 0) for i, u in enumerate(t)]
        return (_sum(*shares),)


class Where(Chosen):
    names = ("WhereBackward0",)
    saved, origins = ("condition",), (0,)

    def share(self, s: Saved, u: Tensor, first: bool) -> Tensor:
        (condition,) = s
        return torch.where(condition, u, 0) if first else torch.where(condition, 0, u)


class Maximum(Chosen):
    """Where both are the largest, each has a half."""

    names = ("MaximumBackward0",)
    saved, origins = ("self", "other"), (0, 1)

    def share(self, s: Saved, u: Tensor, first: bool) -> Tensor:
        a, b = s if first else s[::-1]
        return self._where_larger(torch.where(a == b, u / 2, u), a, b)

    def _where_larger(self, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return u.masked_fill(a < b, 0)


class Minimum(Maximum):
    names = ("MinimumBackward0",)

    def _where_larger(self, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return u.masked_fill(a > b, 0)


class Lerp(Elementwise):
    """y = a + w (b - a), w a number."""

    names = ("LerpBackward0",)
    constants = ("weight",)

    def set_up(self, weight: float) -> None:
        self.factors = (1 - weight, weight)

    pull, push = Add.pull, Add.push


class Addcmul(Elementwise):
    """y = x + value a b."""

    names = ("AddcmulBackward0",)
    saved, origins, constants = ("tensor1", "tensor2"), (1, 2), ("value",)

    def set_up(self, value: float) -> None:
        self.value = value

    def curved(self, moving: Sequence[bool]) -> bool:
        return moving[1] and moving[2]

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        a, b = s
        scaled = _times(c[0], self.value)
        return (
            c[0] if wanted[0] else None,
            _product(scaled, b) if wanted[1] else None,
            _product(scaled, a) if wanted[2] else None,
        )

    def push(self, s: Saved, t: Tensors) -> Tensors:
        products = _sum(_product(t[1], s[1]), _product(s[0], t[2]))
        return (_sum(t[0], _times(products, self.value)),)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        scaled = _times(c[0], self.value)
        return None, _product(scaled, t[2]) if wanted[1] else None, _product(scaled, t[1]) if wanted[2] else None


class PReLU(Elementwise):
    """Leaky ReLU with a learned slope for x <= 0."""

    names = ("PreluKernelBackward0",)
    saved, origins = ("self", "weight"), (0, 1)
    sends = True

    def curved(self, moving: Sequence[bool]) -> bool:
        return all(moving)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        x, w = s
        cotangent = c[0]
        assert cotangent is not None
        positive = x > 0
        return (
            torch.where(positive, cotangent, cotangent * w) if wanted[0] else None,
            torch.where(positive, 0, cotangent * x) if wanted[1] else None,
        )

    def push(self, s: Saved, t: Tensors) -> Tensors:
        x, w = s
        positive = x > 0
        first = None if t[0] is None else torch.where(positive, t[0], t[0] * w)
        second = None if t[1] is None else torch.where(positive, 0, t[1] * x)
        return (_sum(first, second),)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        x, _ = s
        cotangent = c[0]

        def at_negative(u: Tensor | None) -> Tensor | None:
            return None if u is None else torch.where(x > 0, 0, cotangent * u)  # type: ignore[operator]

        return at_negative(t[1]) if wanted[0] else None, at_negative(t[0]) if wanted[1] else None


RULES: tuple[type[Rule], ...] = (
    *(ReLU, Threshold, LeakyReLU, LeakyReLUInPlace, Hardtanh, Hardsigmoid, Abs, Clamp, ClampMin, ClampMax, MaskedFill),
    *(Negative, Copy, AddNumber, SubtractFromNumber, MulNumber, DivNumber, Flat),
    *(Tanh, Sigmoid, SiLU, Mish, GELU, ELU, ELUInPlace, CELU, Softplus, Hardswish, LogSigmoid, Exp, Expm1, Log, Log1p),
    *(Sqrt, Rsqrt, Reciprocal, Sin, Cos, Atan, Erf, Power),
    *(Add, Sub, Rsub, Mul, Div, Where, Maximum, Minimum, Lerp, Addcmul, PReLU),
)
