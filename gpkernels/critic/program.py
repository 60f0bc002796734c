"""Programs: the calls that the passes of one signature make, as a flat list.

The passes depend on the signature alone. When it occurs for the second time they are traced, while they run, into a
list of ATen and gpkernels calls with numbered slots for tensors; from then on the list is run by a C++ loop, or from
Python without the extension: no rule and no autograd per call. A call that cannot be recorded, because it is a node of
autograd's graph of this very pass, splits the list. Programs hold no tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpkernels import backends
from gpkernels.critic.cheaper import cheaper
from gpkernels.critic.compiled import Options, chosen, compiled
from gpkernels.critic.order import early, late
from gpkernels.critic.reuse import Place, reusing
from gpkernels.critic.slots import (
    Outside,
    Slot,
    does_more,
    inputs_of,
    may_be_view,
    may_write,
    memory_of,
    slots_made,
    slots_read,
)
from gpkernels.private import TorchDispatchMode, dispatch_mode, transforms_active, without_dispatch_modes

CAPACITY = 256
WORTH = 8  # calls in a stretch: for fewer, what surrounds a compiled function costs more than it saves
aten = torch.ops.aten
_DETACH = aten.detach.default
Tensors = Sequence[Tensor | None]
Outsider = Callable[[Hashable, Tensors], Tensors]  # makes an unrecorded call, by its name
Work = Callable[[Tensors, Outsider], Tensors]  # (inputs, outsider) -> results


class Alias(NamedTuple):
    """Geometry of a view within a tensor of known layout, from which a loop can create it without dispatch."""

    base_sizes: tuple[int, ...]
    base_strides: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @staticmethod
    def of(base: Tensor, view: Tensor) -> Alias:
        offset = int(view.storage_offset()) - int(base.storage_offset())
        return Alias(tuple(base.shape), base.stride(), tuple(view.shape), view.stride(), offset)


class Facts(NamedTuple):
    """What is known of recorded tensors: the geometry of views, sizes in bytes, and places."""

    aliases: dict[Slot, Alias]
    sizes: dict[Slot, int]
    places: dict[Slot, Place]


def _shares(x: Tensor, out: Tensor) -> bool:
    """Whether what may be a view is one: ``contiguous`` gives a copy, too."""
    if not x.layout == out.layout == torch.strided:
        return False
    return x.untyped_storage()._cdata == out.untyped_storage()._cdata


class Changed(Exception):
    """Raised where an unrecorded call returned None for other results than when the program was traced."""


class Untraceable(Exception):
    """Raised where the passes use a tensor that is neither an input nor a result."""


class Cheaply(TorchDispatchMode):
    """Dispatch mode that runs calls in the cheapest way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        other = cheaper(func, args, kwargs)
        return func(*args, **kwargs) if other is None else other()


class Recorder(TorchDispatchMode):
    """Dispatch mode that runs calls in the cheapest way and records them."""

    def __init__(self, inputs: Tensors, cheaply: bool = True) -> None:
        super().__init__()
        self.cheaply = cheaply
        self.known: dict[int, Slot] = {}
        self.alive: list[Any] = []  # keeps ids unique
        self.calls: list[Any] = []
        self.views: dict[Any, Slot | None] = {}
        self.facts = Facts({}, {}, {})
        self.count = 0
        self.inputs = [None if x is None else self._new(x) for x in inputs]

    def _new(self, x: Tensor) -> Slot:
        slot = Slot(self.count)
        self.count += 1
        self.facts.sizes[slot] = x.numel() * x.element_size()
        if (place := Place.of(x)) is not None:
            self.facts.places[slot] = place
        self._same(x, slot)
        return slot

    def _same(self, x: Tensor, slot: Slot) -> None:
        self.known[id(x)] = slot
        self.alive.append(x)

    def slot(self, x: Any) -> Any:
        """Replace the tensors of an argument by slots."""
        if isinstance(x, Tensor):
            known = self.known.get(id(x))
            if known is None:
                raise Untraceable(f"a tensor of shape {tuple(x.shape)} that is neither an input nor a result")
            return known
        if isinstance(x, (list, tuple)):
            return [self.slot(y) for y in x]
        return x

    def _result(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return None if id(x) in self.known else self._new(x)
        if isinstance(x, (list, tuple)):
            return [self._result(y) for y in x]
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        other = cheaper(func, args, kwargs) if self.cheaply else None
        if other is not None:
            with self:
                return other()
        given = self.slot(args), {name: self.slot(x) for name, x in kwargs.items()}
        out = func(*args, **kwargs)
        if func is _DETACH:  # no autograd here
            self._same(out, given[0][0])
            return out
        if may_be_view(func) and isinstance(out, Tensor) and isinstance(given[0][0], Slot) and _shares(args[0], out):
            key = func, str(given)
            known = self.views.setdefault(key, None)
            if known is not None:
                self._same(out, known)
                return out
            slot = self.views[key] = self._new(out)
            if out.dtype == args[0].dtype:
                self.facts.aliases[slot] = Alias.of(args[0], out)
            self.calls.append((func, *given, slot))
            return out
        self.calls.append((func, *given, self._result(out)))
        return out

    def outside(self, outsider: Outsider, name: Hashable, given: Tensors) -> Tensors:
        """Make a call that is not recorded."""
        with without_dispatch_modes():
            out = outsider(name, given)
        inputs = [None if x is None else self.slot(x) for x in given]
        self.calls.append(Outside(name, inputs, [None if x is None else self._new(x) for x in out]))
        return out


class Program:
    """A list of calls, for tensors of the layouts that it was traced with."""

    def __init__(
        self,
        calls: list[Any],
        inputs: list[Slot | None],
        results: list[Slot | None],
        facts: Facts,
        options: Options | None = None,
    ) -> None:
        self.results, self.facts, self.options = results, facts, options
        kept, sizes = {s for s in results if s is not None}, facts.sizes
        self.parts = self._parted(late(early(self._needed(calls), kept, sizes), kept, sizes))
        read = kept.union(*(part.inputs for part in self.parts))
        self.inputs = [s if s in read else None for s in inputs]  # the others are freed at once

    @staticmethod
    def of(recorder: Recorder, results: Tensors, options: Options | None = None) -> Program:
        """Build a program of everything that was recorded, with some tensors as results; options: to compile it."""
        slots = [None if x is None else recorder.slot(x) for x in results]
        return Program(recorder.calls, recorder.inputs, slots, recorder.facts, options)

    def _needed(self, calls: list[Any]) -> list[Any]:
        """Drop calls whose results are unused."""
        memory = memory_of(calls)
        read = {s for s in self.results if s is not None}
        read_in = {None, *(memory.get(s) for s in read)}  # None: memory of inputs
        kept = []
        for call in reversed(calls):
            given = slots_read(call)
            if not isinstance(call, Outside):
                writes = may_write(call[0]) and any(memory.get(s) in read_in for s in given)
                if not (writes or does_more(call[0])) and read.isdisjoint(slots_made(call)):
                    continue
            read.update(given)
            read_in.update(memory.get(s) for s in given)
            kept.append(call)
        return kept[::-1]

    def _parted(self, calls: list[Any]) -> list[Any]:
        """Split the calls into stretches with inputs and outputs, and the unrecorded calls between them."""
        stretches: list[list[Any]] = [[]]
        between: list[Outside] = []
        for call in calls:
            if isinstance(call, Outside):
                between.append(call)
                stretches.append([])
            else:
                stretches[-1].append(call)
        later = {s for s in self.results if s is not None}
        parts: list[Any] = []
        for k in range(len(stretches) - 1, -1, -1):
            if k < len(between):
                parts.append(between[k])
                later -= {s for s in between[k].outputs if s is not None}
                later |= {s for s in between[k].inputs if s is not None}
            stretch = Stretch(stretches[k], later, self.facts, self.options)
            parts.append(stretch)
            later = (later - set(stretch.outputs)) | set(stretch.inputs)
        return parts[::-1]

    def run(self, inputs: list[Tensor | None], outsider: Outsider) -> list[Tensor | None]:
        """Run the program. The list of inputs is emptied, so that tensors can be freed after their last use."""
        if len(self.parts) == 1:
            (stretch,) = self.parts
            return stretch.run(inputs, self.inputs, self.results)
        memory: dict[Any, Tensor | None] = {s: x for s, x in zip(self.inputs, inputs, strict=True) if s is not None}
        inputs.clear()
        for part in self.parts:
            if isinstance(part, Stretch):
                given = [memory[s] for s in part.inputs]
                for s in part.done:
                    del memory[s]
                memory.update(zip(part.outputs, part.run(given, part.inputs, part.outputs), strict=True))
                continue
            made = outsider(part.name, [None if s is None else memory[s] for s in part.inputs])
            if [x is None for x in made] != [s is None for s in part.outputs]:
                raise Changed
            memory.update({s: x for s, x in zip(part.outputs, made, strict=True) if s is not None})
        return [None if s is None else memory[s] for s in self.results]

    def run_here(self, inputs: list[Tensor | None]) -> list[Tensor | None]:
        """Run a program without unrecorded calls by PyTorch's dispatcher, which knows batched tensors."""
        (stretch,) = self.parts
        return stretch.run_here(inputs, self.inputs, self.results)


class Stretch:
    """Recorded calls that run without interruption."""

    def __init__(self, calls: list[Any], later: set[Any], facts: Facts, options: Options | None = None) -> None:
        self.facts, self.options = facts, options if len(calls) >= WORTH else None
        self.calls, self.inputs = calls, inputs_of(calls)
        made = {s for call in calls for s in slots_made(call)}
        self.outputs = sorted(s for s in later if s in made)
        self.done = [s for s in self.inputs if s not in later]
        self.frees = self._last_uses(later)
        self.native: Any = None

    def _last_uses(self, kept: set[Any]) -> list[list[Any]]:
        """For each call, the slots whose last use it is."""
        frees: list[list[Any]] = []
        seen = set(kept)
        for call in reversed(self.calls):
            mine = {*slots_read(call), *slots_made(call)}
            frees.append(sorted(mine - seen))
            seen |= mine
        return frees[::-1]

    def run(self, given: list[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        """Return the outputs for the given inputs; None stays None. The list of inputs is emptied."""
        if self.native is None and self.options is not None:
            function = compiled(self.calls, inputs, outputs, given, Slot, self.options)
            self.native = function if backends.program is None else backends.program.Program(function)
        elif self.native is None and backends.program is not None:
            self.native = self._translated(inputs, outputs)
        return self.run_here(given, inputs, outputs) if self.native is None else self.native(given)

    def _translated(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Translate the list for the C++ loop."""
        calls = []
        for call in reusing(self.calls, self.outputs, self.facts.places):
            func, args, kwargs, out = call
            name = func._schema.name, func._schema.overload_name
            alias = self.facts.aliases.get(out) if isinstance(out, Slot) else None
            places = [self.facts.places.get(s) for s in (*slots_read(call), *slots_made(call))]
            single = all(place is not None and place.dtype == torch.float32 for place in places)
            calls.append((name, args, kwargs, out if isinstance(out, list) else [out], alias, single))
        numbers = [[-1 if s is None else s for s in slots] for slots in (inputs, outputs)]
        return backends.program.Program(calls, *numbers, self.frees, Slot)

    def run_here(self, given: list[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        """Run the calls from Python."""
        memory = {s: x for s, x in zip(inputs, given, strict=True) if s is not None}
        given.clear()
        with torch.no_grad():
            for (func, args, kwargs, out), frees in zip(self.calls, self.frees, strict=True):
                _store(memory, out, func(*_filled(args, memory), **{k: _filled(v, memory) for k, v in kwargs.items()}))
                for s in frees:
                    memory.pop(s, None)
        return [None if s is None else memory[s] for s in outputs]


def _filled(x: Any, memory: dict[Any, Any]) -> Any:
    if isinstance(x, Slot):
        return memory[x]
    return [_filled(y, memory) for y in x] if isinstance(x, list) else x


def _store(memory: dict[Any, Any], slots: Any, values: Any) -> None:
    if isinstance(slots, Slot):
        memory[slots] = values
    elif isinstance(slots, list):
        for s, x in zip(slots, values, strict=True):
            _store(memory, s, x)


# --- by signature -----------------------------------------------------------------------------------------------------


class Signature:
    """State of a signature: facts derived from it, and its program from the second occurrence on."""

    def __init__(self, known: Any) -> None:
        self.known, self.met, self.options = known, False, chosen()
        self.program: Program | None = None

    @property
    def native(self) -> Any:
        """The program in C++, where it runs without Python; None until it has run."""
        parts = [] if self.program is None else self.program.parts
        return parts[0].native if len(parts) == 1 else None

    def run(self, inputs: list[Tensor | None], work: Work, outsider: Outsider) -> Tensors:
        """Run ``work``, by the program if there is one. The list of inputs is emptied."""
        if not _traceable(inputs):
            return work(inputs, outsider)
        if self.program is not None:
            given = list(inputs) if self.program.parts[1:] else []
            try:
                return self.program.run(inputs, outsider)
            except Changed:
                self.program, self.met = None, False
                with Cheaply():
                    return work(given, _unseen(outsider))
        if not self.met:
            self.met = True
            with Cheaply():
                return work(inputs, _unseen(outsider))
        recorder = Recorder(inputs, self.options is None)
        # A compiler is given PyTorch's own calls, which it can fuse.
        with nullcontext() if self.options is None else backends.backend("reference"), recorder:
            results = work(inputs, lambda name, given: recorder.outside(outsider, name, given))
        self.program = Program.of(recorder, results, self.options)
        return results


def _unseen(outsider: Outsider) -> Outsider:
    """The same, with no mode looking on."""

    def call(name: Hashable, given: Tensors) -> Tensors:
        with without_dispatch_modes():
            return outsider(name, given)

    return call


class Cache:
    """LRU cache of signatures."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity, self._entries, self._lock = capacity, OrderedDict[Hashable, Signature](), Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Signature:
        """Return the key's signature under the options in force; ``make`` derives the facts of a new one."""
        key = key, chosen()
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                return found
        found = Signature(make())
        with self._lock:
            self._entries[key] = found
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)
        return found

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


signatures = Cache()


def _traceable(inputs: Tensors) -> bool:
    """Whether no mode is active, all tensors are plain, and no backend is forced."""
    if backends.forced() is not None or torch.compiler.is_compiling() or watched():
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in inputs)


def watched() -> bool:
    """Whether a dispatch mode or a functorch transform is active, which has to see every call."""
    return dispatch_mode() is not None or transforms_active()
