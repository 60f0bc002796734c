"""Counts of a call: FLOPs, dispatched operations, bytes of their arguments and results, and peak memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from gpkernels.ops.scaled_dot_product_attention import register_flops
from gpkernels.private import TorchDispatchMode, tree_leaves

aten = torch.ops.aten
register_flops()
_NOTHING = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}


@dataclass(frozen=True)
class Counts:
    """Counts of one call.

    flops: of products and convolutions. calls: operations other than views. bytes: of their arguments and results, each
    once. peak: maximum of bytes held beyond those before the call.
    """

    flops: int
    calls: int
    bytes: int
    peak: int


def is_work(func: Any) -> bool:
    """Whether an operation does more than create a view or allocate."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not view and func._overloadpacket not in _NOTHING


def bytes_of(value: Any) -> int:
    """Sum the bytes of all tensors in a value, each once."""
    found = {id(x): x for x in tree_leaves(value) if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in found.values())


class Watched(TorchDispatchMode):
    """Dispatch mode that counts, and keeps products and convolutions to replay them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.calls = self.bytes = 0
        self.products: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in flop_registry:
            self._keep(func, args, kwargs)
        out = func(*args, **kwargs)
        if is_work(func):
            self.calls += 1
            self.bytes += bytes_of((args, kwargs)) + bytes_of(out)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out

    def _keep(self, func: Any, args: Any, kwargs: Any) -> None:
        again = [a.detach() if isinstance(a, Tensor) else a for a in args]
        if func == aten.addmm_.default:
            again[0] = again[0].clone()
        self.products.append(lambda: func(*again, **kwargs))


def watched(call: Callable[[], Any]) -> Watched:
    """Run a call once and return what it dispatches."""
    with Watched() as mode:
        call()
    return mode


def bare_products(call: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that runs the products and convolutions of a call alone."""
    found = watched(call).products

    def bare() -> None:
        with torch.no_grad():
            for product in found:
                product()

    return bare


def count(call: Callable[[], Any], device: torch.device) -> Counts:
    """Count a call in its steady state, which a critic's step reaches after two calls."""
    for _ in range(3):
        call()
    found = watched(call)
    return Counts(found.flops, found.calls, found.bytes, peak(call, device))


def peak(call: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of bytes that a call holds beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints when it starts and stops
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
