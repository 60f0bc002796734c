"""Passes over a graph, by the rules of its calls.

Rows of a batch are of two kinds: plain rows, whose scores have cotangents, come first; penalised rows, at which the
norm of the input gradient is penalised, come last. With activations a and Jacobians J:

- pull the cotangents of the scores back: weight gradients at plain rows, delta = J^T 1 at penalised ones
- push v, the derivative of the penalty by the input gradient, forward through the penalised rows: t = J v
- bend: add each call's derivative of <delta, J t> by its arguments, weights among them; that of an activation is pulled
  back once more, together with the cotangents of a loss on the scores of those rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gpkernels.critic.generic import fitted
from gpkernels.critic.plan import ALL, PENALISED, PLAIN, Call, Place, Plan
from gpkernels.critic.rules.base import Layout, Saved, Unary
from gpkernels.critic.rules.products import Lazy
from gpkernels.critic.rules.shapes import T
from gpkernels.ops.tensors import overlaps
from gpkernels.private import foreach_add

Outsider = Callable[[tuple[Any, ...], Sequence[Tensor | None]], Sequence[Tensor | None]]
Cotangents = dict[Place, Tensor]
COPIED = 1 << 18  # bytes of an operand below which a copy costs less than a call


class Passes:
    """Passes over one graph.

    outsider: differentiates a call without a rule, given a name of the request. only_pulls: whether there is no
    pass but ``pull``.
    """

    def __init__(
        self, plan: Plan, saved: Sequence[Tensor | None], outsider: Outsider, only_pulls: bool = False
    ) -> None:
        if plan.picks is not None:
            saved = [x if x is None or row is None else row.of(x) for x, row in zip(saved, plan.picks, strict=True)]
        self.plan, self.saved, self.outsider, self._only_pulls = plan, saved, outsider, only_pulls
        self.to_weights: dict[Place, list[Any]] = {}
        self.deltas: dict[int, list[Tensor | None]] = {}
        self._tangents: dict[int, list[Tensor | None]] = {}
        self._cut: dict[tuple[int, str], Saved] = {}
        self._bent: dict[int, dict[Place, Tensor]] = {}
        self._joint: dict[int, Sequence[Tensor | None]] = {}

    # --- pull ---------------------------------------------------------------------------------------------------------

    def pull(self, seeds: Mapping[Place, Tensor]) -> Cotangents:
        """Pull the scores' cotangents back; return the inputs' gradients, at the penalised rows or where wanted."""
        plan = self.plan
        cotangents: Cotangents = {}
        for p, seed in seeds.items():
            whole = plan.calls[p[0]].trains or not plan.plain
            (u,) = [seed] if whole else self._rows(p[0], [seed], PENALISED)
            if u is not None:
                cotangents[p] = u
        penalised = plan.plain < plan.rows
        for i in range(len(plan.calls) - 1, -1, -1):
            call = plan.calls[i]
            if call.leaf or not (call.moves or not penalised):
                continue
            c = self._taken(cotangents, i)
            if c is None:
                continue
            if penalised and call.moves:
                self._pull_penalised(i, call, c, cotangents)
            elif not penalised and call.moves:
                self._hand(call, self._call_pull(i, ALL, c, self._wanted(call, True, True)), ALL, cotangents)
            else:
                self._keep(i, c)
        self._keep_weights(cotangents)
        return cotangents

    def _keep_weights(self, cotangents: Cotangents) -> None:
        """Move cotangents of values that do not depend on the input to ``to_weights``."""
        for place in list(cotangents):
            if not self.plan.calls[place[0]].moves:
                self.to_weights.setdefault(place, []).append(cotangents.pop(place))

    def _keep(self, i: int, c: Sequence[Tensor | None]) -> None:
        for nr, u in enumerate(c):
            if u is not None:
                self.to_weights.setdefault((i, nr), []).append(u)

    def _pull_penalised(self, i: int, call: Call, c: list[Tensor | None], cotangents: Cotangents) -> None:
        """Pull through a call that plain and penalised rows may share; keep the penalised rows' cotangents."""
        plan = self.plan
        both = plan.plain > 0 and call.trains
        lower = self._rows(i, c, PENALISED) if both else c
        if call.uses_tangents:
            self.deltas[i] = lower
        which = PENALISED if plan.plain else ALL
        if call.rule is None:
            self._hand(call, self._generic_first(i, call, c), ALL, cotangents)
            return
        if both:
            weights = self._wanted(call, False, True)
            place = self._joint_product(i, call, weights)
            if place is not None:  # deferred until the penalised rows' tangents are known
                self._joint[i] = c
                weights[place + 1] = False
            if any(weights):
                self._hand(call, self._call_pull(i, PLAIN, self._rows(i, c, PLAIN), weights), PLAIN, cotangents)
            trained = [p is not None and plan.calls[p[0]].moves and plan.calls[p[0]].trains for p in call.parents]
            if any(trained):
                self._hand(call, self._call_pull(i, ALL, c, trained), ALL, cotangents)
            others = [w and not t for w, t in zip(self._wanted(call, True, False, frozen=True), trained, strict=True)]
            if any(others):
                self._hand(call, self._call_pull(i, which, lower, others), which, cotangents)
            return
        self._hand(call, self._call_pull(i, which, c, self._wanted(call, True, False, frozen=True)), which, cotangents)

    def _joint_product(self, i: int, call: Call, weights: Sequence[bool]) -> int | None:
        """Return the operand of a weight gradient that one product can compute for all rows, or None."""
        rule = call.rule
        place = None if rule is None else rule.shared_operand
        if rule is None or place is None or not weights[place + 1]:
            return None
        operand, weight = self.saved[call.saved.start : call.saved.start + 2]
        if operand is None or (weight is not None and _costs_a_copy(operand, weight, rule.joins)):
            return None
        layouts = self.plan.layouts
        p = call.parents[place]
        return place if p is not None and layouts is not None and layouts[p[0]] == layouts[i] == (0, 1) else None

    def _wanted(self, call: Call, moving: bool, weights: bool, frozen: bool = False) -> list[bool]:
        """Select the parents to compute cotangents for: those that depend on the input, or weights."""
        found = []
        for p in call.parents:
            parent = None if p is None else self.plan.calls[p[0]]
            if parent is None:
                found.append(False)
            else:
                found.append((moving and (parent.trains or frozen)) if parent.moves else weights)
        return found

    def _call_pull(self, i: int, which: str, c: Sequence[Tensor | None], wanted: Sequence[bool]) -> Sequence[Any]:
        if not any(wanted):
            return [None] * len(wanted)
        call = self.plan.calls[i]
        if call.rule is None:
            found = self.outsider(("pull", i), list(c))
            return [u if w else None for u, w in zip(found, wanted, strict=True)]
        found = self.plan.variant(i, which)[0].pull(self._saved(i, which), c, wanted)
        return [u if w else None for u, w in zip(found, wanted, strict=False)]

    def _generic_first(self, i: int, call: Call, c: Sequence[Tensor | None]) -> Sequence[Any]:
        found = self.outsider(("first", i), list(c))
        wanted = self._wanted(call, True, False, frozen=True)
        return [u if w else None for u, w in zip(found, wanted, strict=True)]

    # --- push ---------------------------------------------------------------------------------------------------------

    def push(self, directions: Mapping[Place, Tensor]) -> None:
        """Push directions at the inputs forward through the penalised rows, as far as they are needed."""
        plan = self.plan
        which = PENALISED if plan.plain else ALL
        tangents: Cotangents = dict(directions)
        last = {p: i for i, call in enumerate(plan.calls) for p in call.parents if p is not None}
        behind = plan.behind((i, 0) for i in self.deltas)
        for i, call in enumerate(plan.calls):
            if not (behind[i] and call.moves and (call.pushed or call.uses_tangents)) or call.leaf:
                continue
            t = [None if p is None else tangents.get(p) for p in call.parents]
            if call.uses_tangents and i in self.deltas:
                self._tangents[i] = t
            if call.rule is None:
                if i in self.deltas:  # otherwise the scores do not depend on it
                    self._push_generic(i, call, t, tangents)
            elif call.pushed and any(u is not None for u in t):
                pushed = plan.variant(i, which)[0].push(self._saved(i, which), t)
                for nr, u in enumerate(pushed):
                    if u is not None:
                        tangents[i, nr] = self._widened(u, (i, nr), which)
            for p in call.parents:
                if p is not None and last[p] == i:
                    tangents.pop(p, None)

    def _widened(self, t: Tensor, place: Place, which: str) -> Tensor:
        """Expand and cast a tangent to the shape and dtype of its value."""
        meta = self.plan.cut_meta(place, self.plan.window(which))
        t = t if tuple(t.shape) == meta.shape else t.expand(meta.shape)
        return t if t.dtype == meta.dtype else t.to(meta.dtype)

    def _push_generic(self, i: int, call: Call, t: Sequence[Tensor | None], tangents: Cotangents) -> None:
        if not any(u is not None for u in t):
            return
        places = list(dict.fromkeys(self.plan.around(i)))
        found = self.outsider(("push", i, *places), list(t))
        own = len(call.outputs)
        for nr, u in enumerate(found[:own]):
            if u is not None and call.pushed:
                tangents[i, nr] = u
        self._bent[i] = {p: u for p, u in zip(places, found[own:], strict=True) if u is not None}

    def bent(self) -> set[Place]:
        """Return the places at which calls without a rule have curvature."""
        return {place for found in self._bent.values() for place in found}

    # --- bend ---------------------------------------------------------------------------------------------------------

    def bend(self, seeds: Mapping[Place, Tensor], scale: Tensor | None) -> Cotangents:
        """Add the penalised rows' weight gradients; return their gradients at the inputs, where wanted.

        seeds: cotangents of a loss on those rows' scores. scale: used instead if these are the pulled ones times one
        factor per row; both then share one product, delta x (t + scale a).
        """
        plan = self.plan
        which = PENALISED if plan.plain else ALL
        adjoints: Cotangents = dict(seeds)
        for bent in self._bent.values():
            for place, u in bent.items():
                self._give(place, u, ALL, adjoints)
        for i in range(len(plan.calls) - 1, -1, -1):
            call = plan.calls[i]
            if call.leaf or not call.moves:
                continue
            a = self._taken(adjoints, i)
            d, t = self.deltas.pop(i, None), self._tangents.pop(i, None)
            wanted = self._wanted(call, True, True)
            made = {} if a is None else self._pull_on(i, call, a, wanted, which, adjoints)
            if call.rule is None or d is None:
                continue
            if i in self._joint:
                wanted = self._multiply_jointly(i, call, t, scale, wanted, adjoints)
            if scale is not None:
                self._bend_scaled(i, call, d, t, scale, which, wanted, adjoints)
            elif t is not None and any(u is not None for u in t) and any(wanted):
                self._bend_call(i, call, d, t, wanted, which, made, adjoints)
        self._keep_weights(adjoints)
        return adjoints

    def _pull_on(
        self,
        i: int,
        call: Call,
        c: Sequence[Tensor | None],
        wanted: Sequence[bool],
        which: str,
        cotangents: Cotangents,
    ) -> Cotangents:
        """Add a call's VJP to its parents' cotangents; return those that may be written to.

        These are new tensors whose elements do not overlap in memory.
        """
        pulled = self._call_pull(i, which, c, wanted)
        self._hand(call, pulled, which, cotangents)
        return {
            p: cotangents[p]
            for p, u in zip(call.parents, pulled, strict=False)
            if p in cotangents and u is not None and all(u is not x for x in c) and not overlaps(cotangents[p])
        }

    def _bend_call(
        self,
        i: int,
        call: Call,
        d: Sequence[Tensor | None],
        t: Sequence[Tensor | None],
        wanted: Sequence[bool],
        which: str,
        made: Cotangents,
        adjoints: Cotangents,
    ) -> None:
        """Add a call's second-order terms, to its VJP's cotangents if these are ``made``, else to ``adjoints``."""
        rule, saved = self.plan.variant(i, which)[0], self._saved(i, which)
        if isinstance(rule, Unary) and call.parents[0] in made:
            rule.add_bent(made[call.parents[0]], saved, t, d)
            return
        for place, u in zip(call.parents, rule.bend(saved, t, d, wanted), strict=False):
            if place in made and u is not None:
                alone: Cotangents = {}
                self._give(place, u, which, alone)
                made[place].add_(alone[place])
            elif place is not None and u is not None:
                self._give(place, u, which, adjoints)

    def _bend_scaled(
        self,
        i: int,
        call: Call,
        d: Sequence[Tensor | None],
        t: list[Tensor | None] | None,
        scale: Tensor,
        which: str,
        wanted: Sequence[bool],
        adjoints: Cotangents,
    ) -> None:
        plan = self.plan
        rule, _ = plan.variant(i, which)
        saved = self._saved(i, which)
        wanted = [w and v for w, v in zip(wanted, self._wanted(call, False, True), strict=True)]
        t = [None] * len(call.parents) if t is None else t
        place = rule.shared_operand
        layouts = plan.layouts
        assert layouts is not None
        if place is not None and wanted[place + 1] and saved[0] is not None:
            p = call.parents[place]
            own = by_row(saved[0], scale, None if p is None else layouts[p[0]], t[place])
            t = [own if k == place else u for k, u in enumerate(t)]
            one = [k == place + 1 for k in range(len(wanted))]
            self._hand(call, rule.bend(saved, t, d, one), which, adjoints)
            wanted = [w and not o for w, o in zip(wanted, one, strict=True)]
        if rule.adds is not None and wanted[rule.adds]:
            at, layout, (c, *_) = call.parents[rule.adds], layouts[i], d
            if at is not None and layout is not None and c is not None and self._has_columns(at, layout, c):
                rows = c if c.dim() == 2 else c.flatten(2).sum(2)  # each times its factor, without a copy of them
                self._give(at, torch.mv(rows.t(), _factors(scale, layout).to(rows.dtype)), which, adjoints)
                wanted[rule.adds] = False
        if any(wanted):
            scaled = [None if u is None else by_row(u, scale, layouts[i]) for u in d]
            self._hand(call, rule.pull(saved, scaled, wanted), which, adjoints)
            if any(u is not None for u in t):
                self._hand(call, rule.bend(saved, t, d, wanted), which, adjoints)

    def _has_columns(self, weight: Place, layout: Layout, c: Tensor) -> bool:
        """Whether a weight has one number for each entry of axis 1 of an output, whose axis 0 has the samples."""
        return layout.axis == 0 and self.plan.calls[weight[0]].outputs[weight[1]].shape == c.shape[1:2]

    def _multiply_jointly(
        self,
        i: int,
        call: Call,
        t: Sequence[Tensor | None] | None,
        scale: Tensor | None,
        wanted: Sequence[bool],
        adjoints: Cotangents,
    ) -> list[bool]:
        """Compute one product for plain and penalised rows, cotangents x [a; t]; return what is still wanted."""
        plan, rule = self.plan, call.rule
        assert rule is not None
        assert rule.shared_operand is not None
        assert plan.layouts is not None
        place, c = rule.shared_operand, self._joint.pop(i)
        operand = None if t is None else t[place]
        plain, penalised = (self._saved(i, which)[0] for which in (PLAIN, PENALISED))
        assert plain is not None
        assert penalised is not None
        if scale is not None:
            operand = by_row(penalised, scale, Layout(0, 1), operand)
        one = [k == place + 1 for k in range(len(wanted))]
        if operand is None:
            found = self._call_pull(i, PLAIN, self._rows(i, c, PLAIN), one)
        else:
            tangents = [torch.cat([plain, operand.to(plain.dtype)]) if k == place else None for k in range(len(wanted))]
            found = rule.bend(self._saved(i, ALL), tangents, c, one)
        self._hand(call, found, ALL, adjoints)
        return [w and not o for w, o in zip(wanted, one, strict=True)]

    # --- weights ------------------------------------------------------------------------------------------------------

    def leaves(self) -> dict[int, Any]:
        """Return the gradient of each leaf that has one, through the calls that compute weights from them."""
        plan = self.plan
        for i in range(len(plan.calls) - 1, -1, -1):
            call = plan.calls[i]
            if call.leaf or call.moves:
                continue
            parts = [self.to_weights.pop((i, nr), None) for nr in range(len(call.outputs))]
            if all(p is None for p in parts):
                continue
            if isinstance(call.rule, T):
                (place,) = call.parents
                if place is not None:
                    self.to_weights.setdefault(place, []).extend(u.t() for u in parts[0] or ())
                continue
            c = [None if p is None else total(p) for p in parts]
            self._hand(call, self._call_pull(i, ALL, c, [p is not None for p in call.parents]), ALL, {})
        found = {}
        for i, call in enumerate(plan.calls):
            if call.leaf and (i, 0) in self.to_weights:
                found[call.number] = self.to_weights.pop((i, 0))
        return found

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _taken(self, cotangents: Cotangents, i: int) -> list[Tensor | None] | None:
        found = [cotangents.pop((i, nr), None) for nr in range(len(self.plan.calls[i].outputs))]
        return None if all(u is None for u in found) else found

    def _hand(self, call: Call, contributions: Sequence[Any], which: str, cotangents: Cotangents) -> None:
        """Add a call's contributions to its parents' cotangents."""
        for place, u in zip(call.parents, contributions, strict=False):
            if place is not None and u is not None:
                self._give(place, u, which, cotangents)

    def _give(self, place: Place, u: Any, which: str, cotangents: Cotangents) -> None:
        parent = self.plan.calls[place[0]]
        if not parent.moves:
            meta = parent.outputs[place[1]]
            if isinstance(u, Lazy) and u.left.dtype != meta.dtype:
                u = u.value()
            u = u if isinstance(u, Lazy) else fitted(self._whole(u, meta.shape, which), meta.shape, meta.dtype)
            self.to_weights.setdefault(place, []).append(u)
            return
        meta = self.plan.cut_meta(place, self.plan.window(which))
        u = fitted(u.value() if isinstance(u, Lazy) else u, meta.shape, meta.dtype)
        cotangents[place] = cotangents[place] + u if place in cotangents else u

    def _whole(self, u: Tensor, shape: Sequence[int], which: str) -> Tensor:
        """Pad the gradient of a per-sample constant from some rows to all rows with zeros."""
        if which == ALL or u.dim() != len(shape):
            return u
        start, stop = self.plan.window(which)
        for axis, (own, n) in enumerate(zip(u.shape, shape, strict=True)):
            if own == n or n == 1:
                continue
            block = own // (stop - start)
            if block * (stop - start) == own and block * self.plan.rows == n:
                pads = [0, 0] * (u.dim() - 1 - axis) + [start * block, n - stop * block]
                return torch.nn.functional.pad(u, pads)
        return u

    def _rows(self, i: int, c: Sequence[Tensor | None], which: str) -> list[Tensor | None]:
        assert self.plan.layouts is not None
        layout, window = self.plan.layouts[i], self.plan.window(which)
        assert layout is not None
        start, size = window.start * layout.block, (window.stop - window.start) * layout.block
        return [None if u is None else u.narrow(layout.axis, start, size) for u in c]

    def _saved(self, i: int, which: str) -> Saved:
        """Return a call's saved tensors, cut to some rows."""
        if which != ALL and not self.plan.plain:
            which = ALL
        known = self._cut.get((i, which))
        if known is None:
            known = self._cut[i, which] = self._cut_down(i, which)
        return known

    def slopes(self) -> dict[int, Tensor]:
        """First derivatives of elementwise calls that were computed once for all passes, where no rows are plain."""
        found = {i: saved.notes.get("slopes") for (i, _), saved in self._cut.items()}
        return {i: both[0] for i, both in found.items() if both is not None}

    def give_slope(self, i: int, slope: Tensor) -> None:
        """Use a first derivative that is known; whatever computes it again is then unused."""
        notes = self._saved(i, ALL).notes
        notes["slopes"] = slope, notes["slopes"][1]

    def _cut_down(self, i: int, which: str) -> Saved:
        call = self.plan.calls[i]
        rule, cuts = self.plan.variant(i, which)
        tensors = self.saved[call.saved]
        found = Saved([x if x is None or cut is None else x.narrow(*cut) for x, cut in zip(tensors, cuts, strict=True)])
        if (
            isinstance(rule, Unary)
            and call.curved
            and which == (PENALISED if self.plan.plain else ALL)
            and (rule.lasts or not self._only_pulls)
        ):
            rule.prepared(found)  # used by pull, push and bend of these rows
        return found


def by_row(x: Tensor, scale: Tensor, layout: Layout | None, onto: Tensor | None = None) -> Tensor:
    """Multiply each sample of ``x`` by its own factor, and add the result to ``onto``, if there is such a tensor."""
    if layout is not None:
        scale = _factors(scale, layout).to(x.dtype)
        scale = scale.reshape([-1 if axis == layout.axis else 1 for axis in range(x.dim())])
    if onto is None:
        return x * scale
    alike = onto.dtype == x.dtype == scale.dtype and onto.shape == x.shape
    return torch.addcmul(onto, x, scale) if alike else onto + x * scale


def _factors(scale: Tensor, layout: Layout) -> Tensor:
    """Return the factor of each entry of the axis of samples, where a sample has a block of them."""
    return scale if layout.block == 1 else scale[:, None].expand(-1, layout.block).reshape(-1)


def total(parts: Sequence[Any]) -> Tensor:
    """Sum gradients, deferred matrix products among them."""
    return totals([parts])[0]


def _costs_a_copy(operand: Tensor, weight: Tensor, joins: float) -> bool:
    """Whether a copy of an operand costs more than another product on a CPU. Compilers fuse copies."""
    plain = type(operand) in (Tensor, Parameter) and operand.device.type == "cpu"
    return plain and operand.nbytes >= COPIED and operand.nbytes > joins * weight.nbytes


def totals(all_parts: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Sum several lists of gradients, with one foreach call per position."""
    dense = [[p for p in parts if not isinstance(p, Lazy)] for parts in all_parts]
    sums: list[Any] = [parts[0] if parts else None for parts in dense]
    for k in range(1, max(map(len, dense), default=0)):
        at = [i for i, parts in enumerate(dense) if len(parts) > k]
        if len(at) == 1:
            sums[at[0]] = sums[at[0]] + dense[at[0]][k]
            continue
        added = foreach_add([sums[i] for i in at], [dense[i][k] for i in at])
        for i, whole in zip(at, added, strict=True):
            sums[i] = whole
    found = []
    for whole, parts in zip(sums, all_parts, strict=True):
        for p in reversed(parts):  # first those of tangents, which are there before the last cotangents
            if isinstance(p, Lazy):
                whole = p.value(whole)
        found.append(whole)
    return found
