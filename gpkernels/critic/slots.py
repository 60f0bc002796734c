"""Recorded calls: numbers in place of tensors, and which of these a call reads, makes and may write to.

A recorded call is (op, arguments, keyword arguments, results), with slots for tensors, or an ``Outside``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

# These write to the running statistics that they are given, which their schemas do not say.
_UPDATES = {
    *(f"aten::{vendor}_batch_norm" for vendor in ("native", "cudnn", "miopen")),
    *(f"aten::batch_norm_{what}" for what in ("update_stats", "gather_stats", "gather_stats_with_counts")),
}


class Slot(int):
    """Number that stands for a tensor."""


class Outside:
    """A call that is not recorded and made anew in each run, by its name."""

    def __init__(self, name: Hashable, inputs: list[Slot | None], outputs: list[Slot | None]) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs


def may_write(func: Any) -> bool:
    """Whether an operation may write to its arguments."""
    return func._schema.is_mutable or func._schema.name in _UPDATES


def does_more(func: Any) -> bool:
    """Whether an operation does more than to give results: draws random numbers, or checks values."""
    return torch.Tag.nondeterministic_seeded in func.tags or not (func._schema.returns or func._schema.is_mutable)


def may_be_view(func: Any) -> bool:
    """Whether results of an operation may share an argument's memory."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def flat(x: Any) -> list[Any]:
    """Return what is in nested lists and tuples."""
    if isinstance(x, (list, tuple)):
        return [z for y in x for z in flat(y)]
    return [x]


def slots_read(call: Any) -> list[Slot]:
    """Return the slots among a call's arguments."""
    if isinstance(call, Outside):
        return [s for s in call.inputs if s is not None]
    _, args, kwargs, _ = call
    return [s for s in (*flat(args), *flat(list(kwargs.values()))) if isinstance(s, Slot)]


def slots_made(call: Any) -> list[Slot]:
    """Return the slots of a call's results."""
    return [s for s in (call.outputs if isinstance(call, Outside) else flat(call[3])) if isinstance(s, Slot)]


def inputs_of(calls: list[Any]) -> list[Slot]:
    """Return the slots that calls read and none of them makes, in the order of their first use."""
    made: set[Slot] = set()
    found: dict[Slot, None] = {}
    for call in calls:
        found.update((s, None) for s in slots_read(call) if s not in made)
        made.update(slots_made(call))
    return list(found)


def homes_of(calls: list[Any]) -> dict[Slot, Slot]:
    """Return in whose memory views are, inputs included."""
    homes: dict[Slot, Slot] = {}
    for call in calls:
        if not isinstance(call, Outside) and may_be_view(call[0]) and isinstance(call[1][0], Slot):
            homes.update((s, homes.get(call[1][0], call[1][0])) for s in slots_made(call))
    return homes


def memory_of(calls: list[Any]) -> dict[Slot, Slot | None]:
    """Return in whose memory the results of recorded calls are; None: in that of an input or an unrecorded result."""
    homes = homes_of(calls)
    made = {s for call in calls if not isinstance(call, Outside) for s in slots_made(call)}
    return {s: home if (home := homes.get(s, s)) in made else None for s in made}
