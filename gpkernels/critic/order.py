"""Order of recorded calls: those that free memory come as early as they can."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from operator import add
from typing import Any

import torch

from gpkernels.critic.slots import Outside, Slot, homes_of, may_write, memory_of, slots_made, slots_read


def early(calls: list[Any], results: set[Slot], sizes: Mapping[Slot, int]) -> list[Any]:
    """Move calls forward that free at least as much memory as they take, to where their arguments are there.

    A weight gradient is such a call: what it is computed from would be held until the last pass. Views come as early,
    too. A call passes none that writes to what it reads, and no unrecorded one. The most memory that is held at a time
    is nowhere more than in the given order, whether inputs are freed after their last use or held by the caller.
    """
    memory, homes = memory_of(calls), homes_of(calls)
    made_here = {s for call in calls for s in slots_made(call)}
    inputs = {homes.get(s, s) for call in calls for s in slots_read(call)} - made_here
    frees: list[set[Slot]] = [set() for _ in calls]
    ends = {homes.get(s, s): i for i, call in enumerate(calls) for s in (*slots_read(call), *slots_made(call))}
    for s in ends.keys() - {homes.get(s, s) for s in results}:
        frees[ends[s]].add(s)
    takes = [sum(sizes[s] for s in slots_made(call) if s not in homes) for call in calls]
    held = [
        _Held(takes, [sum(sizes[s] for s in freed - kept) for freed in frees], sum(sizes[s] for s in inputs))
        for kept in (set[Slot](), inputs)
    ]
    order: list[int] = []
    for i, call in enumerate(calls):
        order.append(i)
        made = slots_made(call)
        if not made or not _is_function(call) or (held[0].adds[i] > 0 and not any(s in homes for s in made)):
            continue
        read, done = set(slots_read(call)), frees[i].intersection(homes.get(s, s) for s in slots_read(call))
        best = at = i
        while at and not _holds_back(calls[order[at - 1]], read, done, memory, homes):
            at -= 1
            if not all(h.may_pass(i, order[at], at) for h in held):
                break
            if all(h.may_be(i, at) for h in held):
                best = at
        order.insert(best, order.pop())
        for h in held:
            h.move(i, best)
    return [calls[i] for i in order]


class _Held:
    """How much memory is held before each call, in the order so far; most: how much at a time in the given order."""

    def __init__(self, takes: list[int], frees: list[int], at_first: int) -> None:
        self.takes, self.adds = takes, [t - f for t, f in zip(takes, frees, strict=True)]
        self.before = list(accumulate(self.adds, initial=at_first))
        self.most = max(map(add, self.before, takes), default=0)

    def may_be(self, i: int, at: int) -> bool:
        """Whether there is room for call i at a place."""
        return self.before[at] + self.takes[i] <= self.most

    def may_pass(self, i: int, other: int, at: int) -> bool:
        """Whether there is room for the other call, which is at a place, after call i."""
        return self.before[at] + self.adds[i] + self.takes[other] <= self.most

    def move(self, i: int, at: int) -> None:
        """Move call i from its place in the given order."""
        self.before[at + 1 : i + 1] = [held + self.adds[i] for held in self.before[at:i]]


def _is_function(call: Any) -> bool:
    """Whether a call gives the same results at another time, and does nothing else."""
    if isinstance(call, Outside) or call[0].namespace not in ("aten", "gpkernels"):
        return False
    return not may_write(call[0]) and torch.Tag.nondeterministic_seeded not in call[0].tags


def _holds_back(
    other: Any, read: set[Slot], done: set[Slot], memory: Mapping[Slot, Slot | None], homes: Mapping[Slot, Slot]
) -> bool:
    """Whether a call has to stay before one that reads these slots and is the last in the memory of those."""
    if isinstance(other, Outside):
        return True
    touched = (*slots_read(other), *slots_made(other))
    if any(s in read for s in slots_made(other)) or any(homes.get(s, s) in done for s in touched):
        return True
    return may_write(other[0]) and any(memory.get(s) == memory.get(r) for s in touched for r in read)
