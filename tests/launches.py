"""What a call would have a GPU do: kernels and memory sets launched, and bytes that those read and write.

Counted on CPU tensors, with the CUDA kernels emulated. Of PyTorch's operations each that is no view counts as one
launch, two for a convolution with a bias and one for each gradient that a convolution's backward gives: no more than
its CUDA backend launches. Bytes are those of an operation's arguments and results, each once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import emulated
import gpkernels as gpk
from gpkernels import backends

aten = torch.ops.aten
_NOTHING = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
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
            self.bytes += _bytes((args, kwargs)) + _bytes(out)
        return out

    def _emulated(self) -> int:
        return emulated.launches(self.library) + emulated.memory_sets(self.library)


def _launches(func: Any, args: Any) -> int:
    packet, schema = func._overloadpacket, func._schema
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if view or packet in _NOTHING:
        return 0
    if packet == aten.convolution_backward:
        return sum(args[-1])
    return 2 if packet == aten.convolution and args[2] is not None else 1


def _bytes(value: Any) -> int:
    found = {id(x): x for x in tree_leaves(value) if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in found.values())


def launches_of(call: Callable[[], Any]) -> Launches:
    """What a call launches with the CUDA kernels, which it takes though its tensors are a CPU's."""
    backends.add_kernels(BACKEND, emulated.kernels(emulated.build()))
    # What goes through a critic's layers steps aside where somebody watches.
    unwatched = patch("gpkernels.critic.mlp._get_current_dispatch_mode", lambda: None)
    with gpk.backend(BACKEND), unwatched, Launches() as counted:
        call()
    return counted
