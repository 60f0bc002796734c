"""Selection of one row, made ahead of the calls that compute each row alone.

A critic may score one row of many at its end: a class token, the last of a sequence. The passes would go through all
rows of the calls before, such as the last block's MLP, with cotangents of zero and tangents that nobody reads. Here the
graph is rewritten to one in which the row is selected from the last values that mix rows; the calls behind then have
saved tensors of that row alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpkernels.critic.plan import Place, Plan
from gpkernels.critic.rules.base import Meta, Mixed, Rows
from gpkernels.critic.rules.shapes import Select, Slice

# FLOPs of products per forward pass, on CPU or not, whose other rows outweigh the calls that select.
LEAST_FLOPS = {True: 1 << 18, False: 1 << 30}


def planned(key: Any, moving: Mapping[int, bool], rows: int | None, plain: int, block: int = 1) -> Plan:
    """Make a plan as ``Plan`` does, for the graph with selections made early, where this saves products."""
    plan = Plan(key, moving, rows, plain, block)
    picks = _Picks(plan)
    if not picks.are_worth_it():
        return plan
    rewritten = picks.rewrite(key)
    if rewritten is None:
        return plan
    early = Plan(rewritten, moving, rows, plain, block)
    early.picks = picks.of_saved()
    return early


class _Picks:
    """Which calls of a plan need one row alone.

    wanted: for such a call, the row of its output. asked: for each call, the row that it reads of each argument, None
    for all of it. saved: the same for saved tensors.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.wanted: dict[int, Rows] = {}
        self.asked: dict[int, Sequence[Rows | None]] = {}
        self.saved: dict[int, Sequence[Rows | None]] = {}
        users: list[list[tuple[int, int, int]]] = [[] for _ in plan.calls]  # child, its argument, our output
        for j, call in enumerate(plan.calls):
            for at, p in enumerate(call.parents):
                if p is not None:
                    users[p[0]].append((j, at, p[1]))
        ends = {i for i, _ in plan.outputs}
        for i in range(len(plan.calls) - 1, -1, -1):
            if i not in ends:
                self._look_at(i, users[i])
            if i not in self.wanted:
                self._begin(i)

    def _look_at(self, i: int, users: Sequence[tuple[int, int, int]]) -> None:
        """Let a call compute one row alone, if all who use it read that row and it needs no other."""
        call = self.plan.calls[i]
        if call.rule is None or not users:
            return
        asked = [self.asked[j][at] if j in self.asked else None for j, at, _ in users]
        row = asked[0]
        if row is None or any(nr for *_, nr in users) or any(other != row for other in asked[1:]):
            return
        try:
            arguments, saved = call.rule.of_row(row, call.shapes)
        except Mixed:
            return
        for place, read in zip(call.parents, arguments, strict=True):
            parent = None if place is None else self.plan.calls[place[0]].outputs[place[1]]
            if parent is not None and read is not None and read.axis_of(parent.shape) is None:
                return
        for shape, read in zip(call.shapes, saved, strict=True):
            if read is not None and (shape is None or read.axis_of(shape) is None):
                return
        self.wanted[i], self.asked[i], self.saved[i] = row, arguments, saved

    def _begin(self, i: int) -> None:
        """Note the row that a selection reads."""
        call = self.plan.calls[i]
        if not isinstance(call.rule, (Select, Slice)):
            return
        axis, index = call.rule.part[0], call.rule.row()
        shape = call.rule.shape
        if index is not None and shape[axis] > 1:
            self.asked[i] = [Rows.along(shape, axis, index)]

    def are_worth_it(self) -> bool:
        """Whether the products of other rows cost more than selecting. Autograd has the graph as it was."""
        if any(call.rule is None and not call.leaf for call in self.plan.calls):
            return False
        calls = [self.plan.calls[i] for i in self.wanted]
        flops = sum(call.rule.flops(call.shapes) for call in calls if call.rule is not None)
        return bool(calls) and flops > LEAST_FLOPS[calls[0].outputs[0].device.type == "cpu"]

    def of_saved(self) -> list[Rows | None]:
        """Return the row to select of each saved tensor."""
        found: list[Rows | None] = [None] * self.plan.saved_count
        for i, rows in self.saved.items():
            found[self.plan.calls[i].saved] = rows
        return found

    def rewrite(self, key: Any) -> Any:
        """Return the key of the graph with selections made early; None where the memory order does not allow it."""
        entries, _ = key
        made: list[Any] = []
        places: dict[Place, Place] = {}
        selected: dict[Place, list[tuple[Rows, Place]]] = {}  # by their places in the old graph
        readers = self._readers()
        for i, (entry, call) in enumerate(zip(entries, self.plan.calls, strict=True)):
            made.append(entry if call.leaf else self._rewritten(i, entry, places, selected))
            at = len(made) - 1
            for nr, meta in enumerate(call.outputs):
                places[i, nr] = at, nr
                for row in readers.get((i, nr), ()):
                    early = _select(meta, row, places[i, nr])
                    if early is None:
                        return None
                    made.append(early)
                    selected.setdefault((i, nr), []).append((row, (len(made) - 1, 0)))
        return tuple(made), tuple([places[p] for p in self.plan.outputs])

    def _readers(self) -> dict[Place, list[Rows]]:
        """Return the rows that are read of values of which all are computed."""
        found: dict[Place, list[Rows]] = {}
        for j in self.wanted:
            for p, row in zip(self.plan.calls[j].parents, self.asked[j], strict=True):
                if p is not None and row is not None and p[0] not in self.wanted:
                    rows = found.setdefault(p, [])
                    if row not in rows:
                        rows.append(row)
        return found

    def _rewritten(
        self, i: int, entry: Any, places: Mapping[Place, Place], selected: Mapping[Place, list[tuple[Rows, Place]]]
    ) -> Any:
        name, outputs, _, *more = entry
        parents = self.plan.calls[i].parents
        if i not in self.wanted:
            if i in self.asked and any(p is not None and p[0] in self.wanted for p in parents):
                dim, *bounds = more[0]  # of a selection, from one row
                more[0] = (dim, 0, 1, 1) if bounds[1:] else (dim, 0)
            return name, outputs, tuple([None if p is None else places[p] for p in parents]), *more
        found: list[Place | None] = []
        for p, read in zip(parents, self.asked[i], strict=True):
            early = selected.get(p, ()) if p is not None and read is not None else ()
            found.append(next((at for own, at in early if own == read), None if p is None else places[p]))
        (shape, *kinds), *others = outputs
        cut = [m if r is None else (r.cut(m[0]), *m[1:]) for m, r in zip(more[1], self.saved[i], strict=True)]
        return name, ((self.wanted[i].cut(shape), *kinds), *others), tuple(found), more[0], tuple(cut)


def _select(meta: Meta, row: Rows, place: Place) -> Any:
    """Return the entry of a slice of one row of a value, which keeps its axes."""
    at = row.axis_of(meta.shape)
    if at is None or at[1:] != (1, 1):
        return None
    constants = at[0], row.index, row.index + 1, 1
    return Slice.names[0], ((row.cut(meta.shape), meta.dtype, meta.device),), (place,), constants, ()
