"""Elementwise functions of several arguments that are broadcast against each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Elementwise, Rule, Saved, Tensors, Wanted


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
    """y = x1 x2. A scalar factor is a tensor without axes."""

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
    """Selection of one of two arguments, elementwise."""

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
    """y = max(x1, x2); where both are equal, each receives half of the gradient."""

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
    """y = a + w (b - a) for a number w."""

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
    Add,
    Sub,
    Rsub,
    Mul,
    Div,
    Where,
    Maximum,
    Minimum,
    Lerp,
    Addcmul,
    PReLU,
)
