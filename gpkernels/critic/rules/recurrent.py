"""Recurrent layers that PyTorch makes in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpkernels.critic.rules.base import Rule, Saved, Shapes, Tensors, Unfit, Wanted
from gpkernels.critic.rules.products import Lazy

aten = torch.ops.aten
LSTM = 2  # among PyTorch's modes of recurrent layers


class Cells(NamedTuple):
    """All time steps of a layer, (T, N, H) each.

    With gates a = W x + U h' + b, i f o = sigmoid(a), g = tanh(a), c = f c' + i g, h = o tanh(c), where ' is the step
    before. slopes: the derivatives of c by i's, f's and g's a, and of h by o's, side by side; through: that of h by c.
    """

    before: Tensor  # h'
    gates: list[Tensor]  # i, f, g, o
    cells_before: Tensor  # c'
    bent: Tensor  # tanh(c)
    slopes: Tensor
    through: Tensor


class Tangents(NamedTuple):
    """Of a, c, c', h and h'."""

    a: Tensor
    c: Tensor
    c_before: Tensor
    h: Tensor
    h_before: Tensor


class MkldnnLSTM(Rule):
    """One layer in one direction, as oneDNN makes it on CPUs. Samples are in places of their own in outputs 1 and 2."""

    names = ("MkldnnRnnLayerBackward0",)
    saved = ("input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_", "result0")
    constants = ("mode", "has_biases", "batch_sizes", "reverse")
    sends = True

    def set_up(self, mode: int, biased: bool, batch_sizes: tuple[int, ...], reverse: bool) -> None:
        if mode != LSTM or batch_sizes or any(x is not None for x in self.inputs[5:7]):
            raise Unfit("another kind of layer, packed sequences or states that are trained")
        steps = self.outputs[0].shape[0]
        self.order = range(steps - 1, -1, -1) if reverse else range(steps)
        self.biased, self.reverse = biased, reverse

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def flops(self, shapes: Shapes) -> int:
        (steps, rows, width), inner = self.outputs[0].shape, shapes[1]
        return 8 * steps * rows * width * (width + (inner[1] if inner else width))

    def _shifted(self, u: Tensor, first: Tensor) -> Tensor:
        """Of each step, what it finds of the one before."""
        return torch.cat([u[1:], first[None]] if self.reverse else [first[None], u[:-1]])

    def _in_order(self, found: dict[int, Tensor]) -> Tensor:
        return torch.stack([found[step] for step in range(len(found))])

    def _cells(self, s: Saved) -> Cells:
        if "cells" not in s.notes:
            s.notes["cells"] = self._made(*s)
        return s.notes["cells"]

    def _made(
        self, x: Tensor, w: Tensor, u: Tensor, b1: Tensor, b2: Tensor, h0: Tensor, c0: Tensor, h: Tensor
    ) -> Cells:
        before = self._shifted(h, h0)
        entering = x.flatten(0, 1)
        a = torch.addmm(b1 + b2, entering, w.t()) if self.biased else torch.mm(entering, w.t())
        a = torch.addmm(a, before.flatten(0, 1), u.t())
        parts = a.view(*h.shape[:2], -1).chunk(4, -1)
        gates = [part.tanh() if k == 2 else part.sigmoid() for k, part in enumerate(parts)]
        i, f, g, o = gates
        added, cells, last = i * g, {}, c0
        for step in self.order:
            last = cells[step] = torch.addcmul(added[step], f[step], last)
        c = self._in_order(cells)
        cells_before, bent = self._shifted(c, c0), c.tanh()
        pairs = (g, i), (cells_before, f), (i, g), (bent, o)
        slopes = [(aten.tanh_backward if k == 2 else aten.sigmoid_backward)(*pair) for k, pair in enumerate(pairs)]
        return Cells(before, gates, cells_before, bent, torch.cat(slopes, -1), aten.tanh_backward(o, bent))

    def _back(self, s: Saved, c: Tensors, to_a: Tensor | None = None, to_c: Tensor | None = None) -> tuple[Tensor, ...]:
        """The cotangents of a, c and h; to_a, to_c: what these have besides."""
        cells, u = self._cells(s), s[2]
        f = cells.gates[1]
        given, last_h, last_c = c
        at_a: dict[int, Tensor] = {}
        at_c: dict[int, Tensor] = {}
        at_h: dict[int, Tensor] = {}
        later: int | None = None
        for step in reversed(self.order):
            own = [None if given is None else given[step], last_h if later is None else None]
            to_h = _sum(*own)
            if later is not None:
                to_h = at_a[later] @ u if to_h is None else torch.addmm(to_h, at_a[later], u)
            rest = last_c if later is None else at_c[later] * f[later]
            rest = _sum(rest, None if to_c is None else to_c[step])
            h = torch.zeros_like(f[step]) if to_h is None else to_h
            here = h * cells.through[step] if rest is None else torch.addcmul(rest, h, cells.through[step])
            sides = torch.cat([here, here, here, h], -1)
            slopes = cells.slopes[step]
            at_a[step] = sides * slopes if to_a is None else torch.addcmul(to_a[step], sides, slopes)
            at_c[step], at_h[step], later = here, h, step
        return tuple([self._in_order(found) for found in (at_a, at_c, at_h)])

    def _given(self, s: Saved, at_a: Tensor, wanted: Wanted) -> list[Any]:
        """What cotangents of a give to the arguments."""
        x, w, before = s[0], s[1], self._cells(s).before
        flat = at_a.flatten(0, 1)
        found: list[Any] = [None] * len(self.inputs)
        if wanted[0]:
            found[0] = torch.mm(flat, w).view(x.shape)
        for place, operand in ((1, x), (2, before)):
            if wanted[place]:
                found[place] = Lazy(flat, operand.flatten(0, 1))
        for place in (3, 4):
            if wanted[place]:
                found[place] = flat.sum(0)
        return found

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Any:
        back = self._back(s, c)
        s.notes.setdefault("pulled", (list(c), back))  # the first are wanted once more, by ``bend``
        return self._given(s, back[0], wanted)

    def push(self, s: Saved, t: Tensors) -> Tensors:
        if any(u is not None for u in t[1:]):
            raise Unfit("moving weights of a recurrent layer")
        found = self._tangents(s, t[0])  # type: ignore[arg-type]
        last = self.order[-1]
        return found.h, found.h[last], found.c[last]

    def _tangents(self, s: Saved, t: Tensor) -> Tangents:
        known = s.notes.get("pushed")
        if known is not None and known[0] is t:
            return known[1]
        w, u, cells = s[1], s[2], self._cells(s)
        f, width = cells.gates[1], s[2].shape[1]
        entering = torch.mm(t.flatten(0, 1), w.t()).view(*t.shape[:2], -1)
        of_a: dict[int, Tensor] = {}
        of_c: dict[int, Tensor] = {}
        of_h: dict[int, Tensor] = {}
        before: int | None = None
        for step in self.order:
            a = entering[step] if before is None else torch.addmm(entering[step], of_h[before], u.t())
            moved = a * cells.slopes[step]
            c = moved[:, : 3 * width].view(-1, 3, width).sum(1)
            c = c if before is None else torch.addcmul(c, f[step], of_c[before])
            h = torch.addcmul(moved[:, 3 * width :], cells.through[step], c)
            of_a[step], of_c[step], of_h[step], before = a, c, h, step
        a, c, h = (self._in_order(found) for found in (of_a, of_c, of_h))
        nothing = torch.zeros_like(h[0])
        found = Tangents(a, c, self._shifted(c, nothing), h, self._shifted(h, nothing))
        s.notes["pushed"] = t, found
        return found

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Any:
        tangent = t[0]
        if tangent is None:
            return [None] * len(self.inputs)
        of, back = s.notes.get("pulled", ((), None))
        same = len(of) == len(c) and all(u is v for u, v in zip(of, c, strict=True))
        at_a, at_c, at_h = back if same else self._back(s, c)
        cells, moved = self._cells(s), self._tangents(s, tangent)
        i, f, g, o = cells.gates
        bent, ta = cells.bent, moved.a.chunk(4, -1)
        si, sf, so = (aten.sigmoid_backward(u, gate) for u, gate in zip((ta[0], ta[1], ta[3]), (i, f, o), strict=True))
        sg, into = aten.tanh_backward(ta[2], g), aten.tanh_backward(moved.c, bent)  # how i, f, g, o and tanh(c) move
        to_a = [
            at_c * (g * si * (1 - 2 * i) + aten.sigmoid_backward(sg, i)),
            at_c * (cells.cells_before * sf * (1 - 2 * f) + aten.sigmoid_backward(moved.c_before, f)),
            at_c * (-2 * i * g * sg + aten.tanh_backward(si, g)),
            at_h * (bent * so * (1 - 2 * o) + aten.sigmoid_backward(into, o)),
        ]
        to_c = at_h * (aten.tanh_backward(so, bent) - 2 * o * bent * into)
        earlier = at_c * sf  # to c', which is c of the step before
        nothing = torch.zeros_like(earlier[0])[None]
        to_c = to_c + torch.cat([nothing, earlier[:-1]] if self.reverse else [earlier[1:], nothing])
        again = self._back(s, (None, None, None), torch.cat(to_a, -1), to_c)[0]
        found = self._given(s, again, wanted)
        flat = at_a.flatten(0, 1)
        for place, operand in ((1, tangent), (2, moved.h_before)):
            if wanted[place]:
                both = torch.cat([found[place].left, flat]), torch.cat([found[place].right, operand.flatten(0, 1)])
                found[place] = Lazy(*both)
        return found


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


RULES: tuple[type[Rule], ...] = (MkldnnLSTM,)
