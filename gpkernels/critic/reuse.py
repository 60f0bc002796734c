"""Memory of recorded calls: results are written over an argument that nothing reads any more, where that is possible.

That is so for elementwise calls, and for products that are added to a summand. It takes no memory from the allocator,
and touches less of it; the arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpkernels.critic.slots import Slot, inputs_of, may_be_view, slots_made, slots_read
from gpkernels.private import OpOverload, has_kernel

aten = torch.ops.aten
# Elementwise operations that PyTorch does not tag as such.
_UNTAGGED = {aten.elu_backward, aten.hardtanh_backward, aten.leaky_relu_backward, aten.softplus_backward}
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}  # dispatch keys of devices
_SUMS = {aten.addmm, aten.baddbmm}  # whose first argument alone can be written over


class Place(NamedTuple):
    """Where a recorded tensor was. storage: a number for its memory; whole: whether it fills that without gaps."""

    storage: int
    whole: bool
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Place | None:
        """Return the place of a tensor, or None for one without strides."""
        if x.layout != torch.strided:
            return None
        storage = x.untyped_storage()
        dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        whole = dense and storage.nbytes() == x.numel() * x.element_size() > 0
        return Place(storage._cdata, whole, x.device.type, x.dtype, tuple(x.shape), x.stride())

    def holds(self, other: Place) -> bool:
        """Whether a result of the other place can be written here instead."""
        return self.whole and self[2:] == other[2:]


def reusing(calls: list[Any], later: Iterable[Slot], places: Mapping[Slot, Place]) -> list[Any]:
    """Give calls an argument to write to, where neither it nor a view of it is read afterwards.

    Its memory has to come from one of these calls. later: slots that are read after them.
    """
    ends = _ends(calls, later, places)
    return [_written_over(call, i, ends, places) for i, call in enumerate(calls)]


def _written_over(call: Any, i: int, ends: Mapping[int, int], places: Mapping[Slot, Place]) -> Any:
    """Return call i with an argument to write to if there is one, otherwise as it is."""
    func, args, kwargs, out = call
    if func.namespace != "aten" or not isinstance(out, Slot) or out not in places or places[out].device not in _KEYS:
        return call
    other = _writing(func, places[out].device)
    if other is None:
        return call
    read = [s for s in slots_read(call) if s in places]
    is_sum = func.overloadpacket in _SUMS
    for s in read[:1] if is_sum else read:
        storage = places[s].storage
        others = read[1:] if is_sum else [r for r in read if r != s]
        alone = all(places[r].storage != storage for r in others)
        if alone and ends.get(storage) == i and places[s].holds(places[out]):
            name, writing = other
            return writing, args, {**kwargs, name: s}, out
    return call


def _ends(calls: list[Any], later: Iterable[Slot], places: Mapping[Slot, Place]) -> dict[int, int]:
    """Return the last call that uses each memory which comes from one of these calls and is not used later."""
    ends: dict[int, int] = {}
    made: set[int] = set()
    for i, call in enumerate(calls):
        ends.update((places[s].storage, i) for s in (*slots_read(call), *slots_made(call)) if s in places)
        if not may_be_view(call[0]):  # what copies here may give a view of tensors in another layout
            made.update(places[s].storage for s in slots_made(call) if s in places)
    before = {places[s].storage for s in inputs_of(calls) if s in places}
    kept = before.union(places[s].storage for s in later if s in places)
    return {storage: i for storage, i in ends.items() if storage in made - kept}


@cache
def _writing(func: OpOverload, device: str) -> tuple[str, OpOverload] | None:
    """Return the overload that writes to an argument, and the argument's name; None where no argument may be that."""
    if torch.Tag.pointwise not in func.tags and func.overloadpacket not in _UNTAGGED | _SUMS:
        return None
    if torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
        return None
    mine = _declared(func)
    for name in func.overloadpacket.overloads():
        other: OpOverload = getattr(func.overloadpacket, name)
        outs = [a.name for a in other._schema.arguments if a.is_out]
        # Without a kernel of its own it copies the result of the other overload.
        if len(outs) == 1 and _declared(other) == mine and has_kernel(other.name(), _KEYS[device]):
            return outs[0], other
    return None


def _declared(func: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
