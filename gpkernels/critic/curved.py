"""Passes over a graph with curvature, for plain and penalised rows in one batch.

The gradient at the penalised rows is computed first, alone. Their second-order terms are then pulled back together
with the cotangents of the plain rows, so that every call and every weight gradient is computed once for all rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpkernels.critic.passes import Cotangents, Passes
from gpkernels.critic.plan import ALL, PENALISED, PLAIN, Place, Plan


class CurvedPasses(Passes):
    """Passes for plans that ``fits`` accepts. Seeds of ``pull`` are those of the penalised rows alone."""

    plain_seeds: Mapping[Place, Tensor]  # cotangents of the plain rows

    @staticmethod
    def fits(plan: Plan, wants: bool) -> bool:
        """Whether these passes support a plan. wants: whether the gradients at plain rows are requested."""
        return plan.curved and 0 < plan.plain < plan.rows and plan.layouts is not None and not wants

    def pull(self, seeds: Mapping[Place, Tensor]) -> Cotangents:
        plan = self.plan
        cotangents: Cotangents = dict(seeds)
        for i in range(len(plan.calls) - 1, -1, -1):
            call = plan.calls[i]
            c = None if call.leaf or not call.moves else self._taken(cotangents, i)
            if c is None:
                continue
            if call.uses_tangents:
                self.deltas[i] = c
            wanted = self._wanted(call, True, False, frozen=True)
            self._hand(call, self._call_pull(i, PENALISED, c, wanted), PENALISED, cotangents)
        return cotangents

    def bend(self, seeds: Mapping[Place, Tensor], scale: Tensor | None) -> Cotangents:
        plan = self.plan
        adjoints: dict[str, Cotangents] = {ALL: {}, PLAIN: dict(self.plain_seeds), PENALISED: dict(seeds)}
        for i in range(len(plan.calls) - 1, -1, -1):
            call = plan.calls[i]
            if call.leaf or not call.moves:
                continue
            d, t = self.deltas.pop(i, None), self._tangents.pop(i, None)
            wanted = self._wanted(call, True, True)
            given = self._given(i, adjoints)
            made = {w: self._pull_on(i, call, c, wanted, w, adjoints[w]) for w, c in given.items()}
            if d is not None and t is not None and any(u is not None for u in t) and any(wanted):
                own = self._penalised_of(made[ALL]) if ALL in made else made.get(PENALISED, {})
                self._bend_call(i, call, d, t, wanted, PENALISED, own, adjoints[PENALISED])
        for some in adjoints.values():
            self._keep_weights(some)
        return {}  # nobody wants the inputs' gradients here

    def _penalised_of(self, cotangents: Cotangents) -> Cotangents:
        """Select the penalised rows of cotangents of all rows."""
        found: Cotangents = {}
        for p, u in cotangents.items():
            (rows,) = self._rows(p[0], [u], PENALISED)
            assert rows is not None
            found[p] = rows
        return found

    def _given(self, i: int, adjoints: dict[str, Cotangents]) -> dict[str, list[Tensor | None]]:
        """Merge a call's cotangents by the rows that have them."""
        found = {which: c for which, some in adjoints.items() if (c := self._taken(some, i)) is not None}
        layout = self.plan.layouts[i]  # type: ignore[index]
        if len(found) < 2 or layout is None or len({tuple([u is None for u in c]) for c in found.values()}) > 1:
            return found
        parts: dict[str, list[Tensor | None]] = {}
        for which in (PLAIN, PENALISED):
            rows = self._rows(i, found[ALL], which) if ALL in found else [None] * len(found[which])
            parts[which] = list(map(_sum, rows, found.get(which) or [None] * len(rows)))
        both = zip(parts[PLAIN], parts[PENALISED], strict=True)
        return {ALL: [None if u is None or v is None else torch.cat([u, v], layout.axis) for u, v in both]}


def _sum(u: Tensor | None, v: Tensor | None) -> Tensor | None:
    return v if u is None else u if v is None else u + v
