"""What a rule is: how a call of the critic takes cotangents back, tangents forth, and how it bends.

For a call y = f(a, b, ...) with Jacobian J and saved tensors s:

- pull:  cotangents of y -> J^T c, the cotangents of a, b, ...
- push:  tangents of a, b, ... -> J t, the tangent of y; None is zero
- bend:  the derivative of <c, J t> with respect to a, b, ...; None where it is zero

A weight is an argument as any other, one without a tangent: its share of a penalty's gradient is what ``bend`` gives.
Rules give what comes out of the formula; broadcasting and dtypes are put right by the passes, as autograd's engine
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
Wanted = Sequence[bool]


class Saved(list[Any]):
    """A call's saved tensors; ``notes`` keeps what a rule has made of them, for its next use."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.notes: dict[str, Any] = {}


class Meta(NamedTuple):
    """A value's shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Layout(NamedTuple):
    """Where a value has its samples: along ``axis``, each ``block`` entries long."""

    axis: int
    block: int


Layouts = Sequence[Layout | None]
Shapes = Sequence[tuple[int, ...] | None]


class Mixed(Exception):
    """Samples meet in a call, or it cannot be told that they do not."""


class Unfit(Exception):
    """A rule cannot take this call; autograd does."""


class Rule:
    """A call's rule, for its shapes and constants.

    names: of autograd's nodes. saved: the tensors that are read, by autograd's names. constants: the same for numbers.
    origins: for each saved tensor, the argument that it is, or -1 for the output.
    sends: whether PyTorch's double backward gives a gradient, perhaps of zeros, to the arguments.
    """

    names: ClassVar[tuple[str, ...]] = ()
    saved: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()
    origins: ClassVar[tuple[int, ...]] = ()
    sends: ClassVar[bool] = False
    flat: bool = False  # whether no tangent goes through
    shared_operand: ClassVar[int | None] = (
        None  # the argument, saved first, that ``bend`` multiplies to get the next one's
    )

    def __init__(self, constants: tuple[Any, ...], inputs: Sequence[Meta | None], outputs: Sequence[Meta]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.set_up(*constants)

    def set_up(self, *constants: Any) -> None:
        """Take the constants, in the order of ``constants``; Unfit where the rule is not for them."""

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        raise NotImplementedError

    def push(self, s: Saved, t: Tensors) -> Tensors:
        raise NotImplementedError

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        return (None,) * len(self.inputs)

    def curved(self, moving: Sequence[bool]) -> bool:
        """Whether ``bend`` gives anything for an argument that moves with the input; moving: which arguments do."""
        return False

    def sends_to(self, moving: Sequence[bool]) -> Sequence[bool]:
        """Which arguments PyTorch's double backward gives a gradient, perhaps of zeros."""
        return [self.sends] * len(self.inputs)

    def flops(self, shapes: Shapes) -> int:
        """Of the call itself, products alone; shapes: of the saved tensors."""
        return 0

    def layout(self, layouts: Layouts) -> Layout | None:
        """Where the output has its samples, from where the arguments have them; Mixed if it has them nowhere."""
        raise Mixed

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        """The same for the saved tensors, from their shapes."""
        return [out if i < 0 else layouts[i] for i in self.origins]


Formula = Callable[..., Tensor]


def aligned(layouts: Layouts, inputs: Sequence[Meta | None], output: Meta) -> Layout | None:
    """The output's layout where arguments are broadcast against each other."""
    found: set[Layout] = set()
    for layout, x in zip(layouts, inputs, strict=True):
        if layout is not None and x is not None:
            axis = layout.axis + len(output.shape) - len(x.shape)
            if x.shape[layout.axis] != output.shape[axis]:
                raise Mixed  # the only sample is spread
            found.add(Layout(axis, layout.block))
    if len(found) > 1:
        raise Mixed
    return next(iter(found), None)


class Elementwise(Rule):
    """Arguments that are broadcast against each other."""

    def layout(self, layouts: Layouts) -> Layout | None:
        return aligned(layouts, self.inputs, self.outputs[0])

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        if out is None:
            return [None] * len(shapes)
        dims = len(self.outputs[0].shape)
        return [None if s is None else Layout(out.axis - dims + len(s), out.block) for s in shapes]


class Unary(Elementwise):
    """y = f(x), element by element: ``slope(c, ...)`` is c f'(x), ``bent(u, ...)`` is u f''(x).

    turned: where f'' is at hand from f', adds q f''(x) / f'(x) to its first argument; q = c f'(x) t is known already.
    """

    slope: Formula
    bent: Formula | None = None
    turned: Callable[..., None] | None = None
    sends = True

    def prepare(self, *s: Any) -> tuple[Tensor, Tensor] | None:
        """f'(x) and f''(x), where they are dear enough to be made once for all passes."""
        return None

    def prepared(self, s: Saved) -> tuple[Tensor, Tensor] | None:
        if "slopes" not in s.notes:
            s.notes["slopes"] = self.prepare(*s)
        return s.notes["slopes"]

    def _sloped(self, u: Tensor | None, s: Saved) -> Tensors:
        known = s.notes.get("slopes")
        return (self.slope(u, *s) if known is None else u * known[0],)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return self._sloped(c[0], s)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        pushed = self._sloped(t[0], s)
        if self.turned is not None:
            s.notes["pushed"] = t[0], pushed[0]
        return pushed

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        if self.bent is None or t[0] is None or c[0] is None:
            return (None,)
        u, known = t[0] * c[0], s.notes.get("slopes")
        return (self.bent(u, *s) if known is None else u * known[1],)

    def add_bent(self, base: Tensor, s: Saved, t: Tensors, c: Tensors) -> None:
        """Add what ``bend`` gives to ``base``, in place."""
        before, pushed = s.notes.pop("pushed", (None, None))
        if t[0] is None or c[0] is None:
            return
        alike = t[0].dtype == c[0].dtype == base.dtype and t[0].shape == c[0].shape == base.shape
        if self.turned is not None and alike and before is t[0] and pushed is not None:
            self.turned(base, c[0] * pushed, *s)
        elif alike and s.notes.get("slopes") is not None:
            base.addcmul_(t[0] * c[0], s.notes["slopes"][1])
        else:
            (bent,) = self.bend(s, t, c, (True,))
            if bent is not None:
                base.add_(bent)


class Linear(Rule):
    """y = A x for one argument: ``back(c)`` is A^T c, ``forth(t)`` is A t. There is nothing to bend."""

    def back(self, c: Tensor, *s: Any) -> Tensor:
        raise NotImplementedError

    def forth(self, t: Tensor, *s: Any) -> Tensor:
        raise NotImplementedError

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        return (self.back(c[0], *s), *[None] * (len(self.inputs) - 1))  # type: ignore[arg-type]

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return (self.forth(t[0], *s),)  # type: ignore[arg-type]
