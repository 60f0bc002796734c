"""Facts that follow from a graph's key: the rule of every call, and which values depend on the input or on weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpkernels.critic.graph import LEAF
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Elementwise, Layout, Meta, Mixed, Rows, Rule, Unfit
from gpkernels.critic.rules.shapes import Cat, Expand

Place = tuple[int, int]  # (index of a call, output number)
Cut = tuple[int, int, int]  # axis, start, length
ALL, PLAIN, PENALISED = "all", "plain", "penalised"


# FLOPs of products per forward pass, on CPU or not, that outweigh the overhead of one call without a rule.
PRODUCTS = {True: 1 << 28, False: 1 << 34}


class Window(NamedTuple):
    """Range of rows of a batch."""

    start: int
    stop: int


class Call:
    """A node of the graph. Parents are places, None where no gradient is needed."""

    def __init__(self, entry: tuple[Any, ...], saved: int) -> None:
        self.name, outputs = entry[0], entry[1]
        self.leaf = self.name == LEAF
        if self.name == LEAF:
            outputs = [(shape, dtype, device) for shape, _, dtype, device in outputs]
        self.outputs = [Meta(tuple(shape), dtype, device) for shape, dtype, device in outputs]
        self.parents: tuple[Place | None, ...] = () if self.leaf else entry[2]
        self.is_read = len(entry) > 3  # otherwise only shapes are known
        self.constants: tuple[Any, ...] = entry[3] if self.is_read else ()
        self.shapes = [None if m is None else tuple(m[0]) for m in entry[4]] if len(entry) > 4 else []
        self.saved = slice(saved, saved + len(self.shapes))
        self.rule: Rule | None = None  # None: left to autograd
        self.moves = self.trains = self.tangible = self.pushed = self.uses_tangents = self.curved = False
        self.sends: Sequence[bool] = ()  # to which parents PyTorch's double backward returns a gradient, possibly zero
        self.number = -1  # index among the leaves


class Plan:
    """Calls of a graph in order, for a batch of ``rows`` rows: ``plain`` ones with own cotangents, then penalised ones.

    moving: the leaves that are inputs, by number, and whether their gradient is wanted besides those of the weights.
    rows: None where the inputs are not batches of one size; the sample axes are then unknown. block: samples in a row.
    """

    def __init__(self, key: Any, moving: Mapping[int, bool], rows: int | None, plain: int, block: int = 1) -> None:
        entries, self.outputs = key
        self.block = block
        self.rows, self.plain = 1 if rows is None else rows, plain
        self.calls: list[Call] = []
        self.leaves = 0
        self.inputs: dict[int, Place] = {}  # by their number among the leaves
        saved = 0
        for i, entry in enumerate(entries):
            call = Call(entry, saved)
            saved = call.saved.stop
            self.calls.append(call)
            if call.leaf:
                call.number = self.leaves
                call.moves, call.trains = call.number in moving, moving.get(call.number, True)
                if call.moves:
                    self.inputs[call.number] = (i, 0)
                self.leaves += 1
            call.parents = tuple([self._place(p) for p in call.parents])
            self._tie(call)
        self.outputs = tuple([p for p in map(self._place, self.outputs) if p is not None])
        self.saved_count = saved
        self.picks: list[Rows | None] | None = None  # the rows of the saved tensors that the calls need, if not all
        self._look_back()
        self.curved = any(call.moves and call.curved for call in self.calls)
        self.layouts, self.meet = (None, None) if rows is None else self._lay_out()
        self._variants: dict[tuple[int, str], tuple[Rule, list[Cut | None]]] = {}

    def _place(self, p: Place | None) -> Place | None:
        """Normalise a place: a leaf has one output, even if it is an output of an older node."""
        return (p[0], 0) if p is not None and self.calls[p[0]].leaf else p

    def _tie(self, call: Call) -> None:
        """Derive what depends on the parents, and look up the rule."""
        parents = [self.calls[p[0]] for p in call.parents if p is not None]
        call.moves |= any(p.moves for p in parents)
        call.trains |= any(p.trains for p in parents)
        call.tangible = (call.leaf and call.moves) or any(p.tangible for p in parents)
        rule = RULES.get(call.name)
        metas = [m for m in (*self.metas(call), *call.outputs) if m is not None]
        if rule is None or call.leaf or not call.is_read or any(m.dtype.is_complex for m in metas):
            return
        try:
            call.rule = rule(call.constants, self.metas(call), call.outputs)
        except Unfit:
            return
        call.tangible &= not call.rule.flat

    def around(self, i: int) -> list[Place]:
        """Return places that derivatives of a call's VJP may reach: its outputs, arguments, and views of outputs."""
        call = self.calls[i]
        views = [(j, nr) for j, c in enumerate(self.calls) for nr in range(len(c.outputs)) if self._is_child(c, i)]
        return [*((i, nr) for nr in range(len(call.outputs))), *(p for p in call.parents if p is not None), *views]

    @staticmethod
    def _is_child(call: Call, i: int) -> bool:
        return any(p is not None and p[0] == i for p in call.parents)

    def metas(self, call: Call) -> list[Meta | None]:
        """Return shapes, dtypes and devices of a call's arguments."""
        return [None if p is None else self.calls[p[0]].outputs[p[1]] for p in call.parents]

    def _look_back(self) -> None:
        """Derive what depends on the calls that come later."""
        for call in reversed(self.calls):
            parents = [None if p is None else self.calls[p[0]] for p in call.parents]
            moving = [p is not None and p.moves for p in parents]
            call.sends = [False] * len(parents)
            if call.moves and not call.leaf:
                call.curved = call.rule is None or call.rule.curved(moving)
                call.uses_tangents = call.curved or any(p is not None and not p.moves for p in parents)
                if call.rule is not None and any(p is not None and p.tangible for p in parents):
                    call.sends = call.rule.sends_to(moving)
            for p in parents:
                if p is not None:
                    p.pushed |= call.moves and (call.uses_tangents or call.pushed)

    @property
    def x(self) -> Place | None:
        """Place of the only input, or None if it is not in the graph."""
        return next(iter(self.inputs.values()), None)

    @property
    def x_meta(self) -> Meta:
        """Shape, dtype and device of the batch, cut to the penalised rows."""
        assert self.x is not None
        return self.cut_meta(self.x, Window(self.plain, self.rows))

    def behind(self, places: Iterable[Place]) -> list[bool]:
        """Return for each call whether one of the places was computed from it."""
        found = [False] * len(self.calls)
        for i, _ in places:
            found[i] = True
        for i in range(len(self.calls) - 1, -1, -1):
            if found[i]:
                for p in self.calls[i].parents:
                    if p is not None:
                        found[p[0]] = True
        return found

    def sent(self, bent: Iterable[Place], score: Place | None) -> list[bool]:
        """Return for each call whether its values have a gradient in PyTorch's double backward, possibly zero.

        bent: where calls without a rule have curvature. score: the output that is differentiated.
        """
        found = [False] * len(self.calls)
        for i, _ in bent:
            found[i] = True
        differentiated = self.behind([] if score is None else [score])
        for i in range(len(self.calls) - 1, -1, -1):
            call = self.calls[i]
            for p, sends in zip(call.parents, call.sends, strict=True):
                if p is not None:
                    found[p[0]] |= found[i] or (sends and differentiated[i])
        return found

    def reached(self, bent: Iterable[Place], score: Place | None, seeded: Iterable[Place]) -> Iterator[Call]:
        """Yield the leaves that have a gradient in PyTorch, possibly zero.

        bent, score: as in ``sent``. seeded: outputs with cotangents of their own.
        """
        behind = self.behind(seeded)
        for i, (call, sent) in enumerate(zip(self.calls, self.sent(bent, score), strict=True)):
            if call.leaf and (sent or behind[i]):
                yield call

    # --- samples ------------------------------------------------------------------------------------------------------

    def leaves_too_much(self) -> bool:
        """Whether calls without a rule cost more than the passes save on products, so that autograd is faster."""
        made = [call for call in self.calls if not call.leaf]
        others = sum(call.rule is None for call in made)
        flops = sum(call.rule.flops(call.shapes) for call in made if call.rule is not None)
        return others * PRODUCTS[self.calls[-1].outputs[0].device.type == "cpu"] > flops

    @property
    def mixes(self) -> str | None:
        """Name of the call in which samples interact, or None."""
        return None if self.meet is None else self.calls[self.meet].name

    def _lay_out(self) -> tuple[list[Layout | None] | None, int | None]:
        """Find the sample axis of every call's output, or the call in which samples interact."""
        found: list[Layout | None] = []
        for i, call in enumerate(self.calls):
            if call.leaf and call.moves:
                found.append(Layout(0, self.block))
                continue
            if not call.moves:
                found.append(None)
                continue
            if call.rule is None:
                return None, i
            try:
                found.append(call.rule.layout([None if p is None else found[p[0]] for p in call.parents]))
                self._look_for_rows(call, found[-1])
            except Mixed:
                return None, i
        return found, None

    def _look_for_rows(self, call: Call, out: Layout | None) -> None:
        """Raise Mixed where a weight has a row for each sample, unless its rows are one expanded row."""
        if out is None or self.rows == 1 or not isinstance(call.rule, (Elementwise, Cat)):
            return
        for p in call.parents:
            parent = None if p is None else self.calls[p[0]]
            if p is None or parent is None or parent.moves:
                continue
            shape = parent.outputs[p[1]].shape
            axis = out.axis - len(call.outputs[0].shape) + len(shape)
            if axis < 0 or shape[axis] != self.rows * out.block:
                continue
            before = self.metas(parent)[0] if isinstance(parent.rule, Expand) else None
            at = axis - len(shape) + (0 if before is None else len(before.shape))
            if before is None or (at >= 0 and before.shape[at] != 1):
                raise Mixed

    def variant(self, i: int, which: str) -> tuple[Rule, list[Cut | None]]:
        """Return a call's rule for some rows of the batch, and the cuts of its saved tensors."""
        known = self._variants.get((i, which))
        if known is None:
            known = self._variants[i, which] = self._cut_down(self.calls[i], i, self.window(which))
        return known

    def window(self, which: str) -> Window:
        if which == ALL:
            return Window(0, self.rows)
        return Window(0, self.plain) if which == PLAIN else Window(self.plain, self.rows)

    def _cut_down(self, call: Call, i: int, window: Window) -> tuple[Rule, list[Cut | None]]:
        assert call.rule is not None
        if window == (0, self.rows) or not call.moves:
            return call.rule, [None] * len(call.shapes)
        assert self.layouts is not None
        inputs = [None if p is None else self.cut_meta(p, window) for p in call.parents]
        outputs = [self.cut_meta((i, nr), window) for nr in range(len(call.outputs))]
        given = [None if p is None else self.layouts[p[0]] for p in call.parents]
        layouts = call.rule.saved_layouts(given, self.layouts[i], call.shapes)
        cuts = [self._cut(layout, shape, window) for layout, shape in zip(layouts, call.shapes, strict=True)]
        return type(call.rule)(call.constants, inputs, outputs), cuts

    def _cut(self, layout: Layout | None, shape: tuple[int, ...] | None, window: Window) -> Cut | None:
        """Return the cut of a saved tensor; None where it is shared by all rows."""
        if layout is None or shape is None or layout.axis < 0 or shape[layout.axis] != self.rows * layout.block:
            return None
        return layout.axis, window.start * layout.block, (window.stop - window.start) * layout.block

    def cut_meta(self, place: Place, window: Window) -> Meta:
        """Return the shape, dtype and device of a value for some rows."""
        meta = self.calls[place[0]].outputs[place[1]]
        layout = None if self.layouts is None else self.layouts[place[0]]
        if layout is None or window == (0, self.rows):
            return meta
        shape = list(meta.shape)
        shape[layout.axis] = (window.stop - window.start) * layout.block
        return meta._replace(shape=tuple(shape))
