"""Order of recorded calls: those that free memory come as early as they can, those that only take it as late."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from operator import add
from typing import Any

import torch

from gpkernels.critic.slots import Outside, Slot, homes_of, may_write, memory_of, slots_made, slots_read

SMALL = 8  # a call that takes at most this part of what it reads is a sum


def late(calls: list[Any], results: set[Slot], sizes: Mapping[Slot, int]) -> list[Any]:
    """Move calls that free at most as much memory as they take back towards the first reader of their results.

    The curvature of an activation is such a call: its slope is held for the last pass anyway. A call passes none that
    writes to what it reads, and no unrecorded one. The most memory that is held at a time is as in ``early``.
    """
    memory, homes = memory_of(calls), homes_of(calls)
    kept = {homes.get(s, s) for s in results}
    _, held = _memory(calls, results, sizes, homes)
    after: list[int] = []  # calls from the present one on, in reverse order
    last: dict[Slot, int] = {}  # the last of them in a slot's memory
    for i in range(len(calls) - 1, -1, -1):
        call, at = calls[i], len(after)
        made = slots_made(call)
        touched = {homes.get(s, s) for s in (*slots_read(call), *made)}
        if any(homes.get(s, s) in last for s in made) and held[0].adds[i] >= 0 and _is_function(call):
            ends = {last[s] for s in (touched & last.keys()) - kept}
            at = _place_of_reader(calls, i, after, ends, memory)
            while not all(h.may_follow(i, i + len(after) - at) for h in held):
                at += 1
            for h in held:
                h.move(i, i + len(after) - at)
        after.insert(at, i)
        last.update((s, i) for s in touched if s not in last)
    return [calls[i] for i in reversed(after)]


def _place_of_reader(
    calls: list[Any], i: int, after: list[int], ends: set[int], memory: Mapping[Slot, Slot | None]
) -> int:
    """Return where call i may come among those after it, in reverse order. ends: calls that it has to precede."""
    read, made = set(slots_read(calls[i])), set(slots_made(calls[i]))
    for at in range(len(after), 0, -1):
        other = calls[after[at - 1]]
        stops = after[at - 1] in ends or isinstance(other, Outside) or not made.isdisjoint(slots_read(other))
        if stops or _writes(other, read, memory):
            return at
    return 0


def early(calls: list[Any], results: set[Slot], sizes: Mapping[Slot, int]) -> list[Any]:
    """Move calls forward that free at least as much memory as they take, to where their arguments are there.

    A weight gradient is such a call: what it is computed from would be held until the last pass. Views come as early,
    too, and sums such as a bias gradient, after which what they read can be freed by another call. A call passes none
    that writes to what it reads, and no unrecorded one. The most memory that is held at a time is nowhere more than in
    the given order, whether inputs are freed after their last use or held by the caller.
    """
    memory, homes = memory_of(calls), homes_of(calls)
    frees, held = _memory(calls, results, sizes, homes)
    order: list[int] = []
    for i, call in enumerate(calls):
        order.append(i)
        made = slots_made(call)
        if not made or not _is_function(call):
            continue
        is_sum = held[0].takes[i] * SMALL <= sum(sizes[s] for s in set(slots_read(call)))
        if held[0].adds[i] > 0 and not is_sum and not any(s in homes for s in made):
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
        """Whether there is room for call i at a place before its own."""
        return self.before[at] + self.takes[i] <= self.most

    def may_pass(self, i: int, other: int, at: int) -> bool:
        """Whether there is room for the other call, which is at a place, after call i."""
        return self.before[at] + self.adds[i] + self.takes[other] <= self.most

    def may_follow(self, i: int, at: int) -> bool:
        """Whether there is room for call i, which adds to what is held, at its own place or one behind it."""
        return at == i or self.before[at + 1] - self.adds[i] + self.takes[i] <= self.most

    def move(self, i: int, at: int) -> None:
        """Move call i from its place in the given order."""
        if at < i:
            self.before[at + 1 : i + 1] = [held + self.adds[i] for held in self.before[at:i]]
        else:
            self.before[i : at + 1] = [held - self.adds[i] for held in self.before[i + 1 : at + 2]]


def _memory(
    calls: list[Any], results: set[Slot], sizes: Mapping[Slot, int], homes: Mapping[Slot, Slot]
) -> tuple[list[set[Slot]], list[_Held]]:
    """Return what is freed after each call, and what is held if inputs are freed, too, and if the caller holds them."""
    made_here = {s for call in calls for s in slots_made(call)}
    inputs = {homes.get(s, s) for call in calls for s in slots_read(call)} - made_here
    frees: list[set[Slot]] = [set() for _ in calls]
    ends = {homes.get(s, s): i for i, call in enumerate(calls) for s in (*slots_read(call), *slots_made(call))}
    for s in ends.keys() - {homes.get(s, s) for s in results}:
        frees[ends[s]].add(s)
    takes = [sum(sizes[s] for s in slots_made(call) if s not in homes) for call in calls]
    at_first = sum(sizes[s] for s in inputs)
    return frees, [
        _Held(takes, [sum(sizes[s] for s in freed - kept) for freed in frees], at_first)
        for kept in (set[Slot](), inputs)
    ]


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
    return _writes(other, read, memory)


def _writes(call: Any, slots: set[Slot], memory: Mapping[Slot, Slot | None]) -> bool:
    """Whether a call may write to the memory of these slots."""
    if not may_write(call[0]):
        return False
    touched = (*slots_read(call), *slots_made(call))
    return any(memory.get(s) == memory.get(r) for s in touched for r in slots)
