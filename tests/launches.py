"""What a call would have a GPU do: kernels and memory sets launched, and bytes that those read and write.

Counted on CPU tensors, with the CUDA kernels emulated. Of PyTorch's operations each that is no view counts as one
launch, two for a convolution with a bias and one for each gradient that a convolution's backward gives: no more than
its CUDA backend launches. Bytes are those of an operation's arguments and results, each once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import emulated
import gpkernels as gpk
from gpkernels import backends
from gpkernels.bench.counts import bytes_of, is_work

aten = torch.ops.aten
BACKEND = "cuda-emulated"


class Launches(TorchDispatchMode):
    """Launches by operation, and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.library = emulated.build()
        self.by_op: Counter[str] = Counter()
        self.bytes = 0

    @property
    def total(self) -> int:
        return sum(self.by_op.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._emulated()
        out = func(*args, **(kwargs or {}))
        launches = self._emulated() - before if func.namespace == emulated.NAMESPACE else _launches(func, args)
        if launches:
            self.by_op[func._overloadpacket.__name__] += launches
            self.bytes += bytes_of((args, kwargs)) + bytes_of(out)
        return out

    def _emulated(self) -> int:
        return emulated.launches(self.library) + emulated.memory_sets(self.library)


def _launches(func: Any, args: Any) -> int:
    packet = func._overloadpacket
    if not is_work(func):
        return 0
    if packet == aten.convolution_backward:
        return sum(args[-1])
    return 2 if packet == aten.convolution and args[2] is not None else 1


def launches_of(call: Callable[[], Any]) -> Launches:
    """Count the launches of a call with the CUDA kernels, emulated on CPU tensors."""
    backends.add_kernels(BACKEND, partial(emulated.kernels, emulated.build()))
    with gpk.backend(BACKEND):
        for _ in range(2):
            call()
        with Launches() as counted:
            call()
    return counted
