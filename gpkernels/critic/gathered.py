"""Critics with parameters that ``fully_shard`` distributes: gathered in a step, their gradients reduced in backward.

FSDP frees gathered parameters after a module's forward pass and again after its backward pass, which a penalty takes
twice, so that a step keeps them from a module's first call until its end. The gradients of a step are those of the
gathered parameters: FSDP itself reduces and scatters them at the end of the backward pass that delivers them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkernels.private import fsdp_groups, fsdp_reduces, fsdp_state


class gathered:
    """Context manager in which the parameters of FSDP's modules are kept gathered, once a module has been called.

    keep: whether they stay so until backward, which reads them.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep, self._thread, self._handle = keep, get_ident(), None
        self._states: dict[Any, None] = {}
        self._groups: list[Any] = []

    def __enter__(self) -> gathered:
        if may_be_sharded():
            self._handle = register_module_forward_pre_hook(self._before)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self._handle.remove()
        for group in self._groups:
            del group.reshard, group.post_backward
            if group._reshard_after_forward and not (self._keep and torch.is_grad_enabled()):
                group.reshard()

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        if get_ident() != self._thread or (state := fsdp_state(module)) is None or state in self._states:
            return
        self._states[state] = None
        for group in fsdp_groups(state):
            if "reshard" not in vars(group):  # no context around this one has it
                group.reshard = group.post_backward = _nothing
                self._groups.append(group)

    def reduces(self, values: Iterable[Tensor | None]) -> None:
        """Let FSDP reduce the gradients that backward from any of the values leaves at gathered parameters."""
        for x in values if self._states else ():
            if x is not None and x.requires_grad:
                x.register_hook(self._at_backward)

    def _at_backward(self, cotangent: Tensor) -> None:
        for state in self._states:
            fsdp_reduces(state)


def may_be_sharded() -> bool:
    """Whether there may be parameters that ``fully_shard`` distributes."""
    return "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()


def _nothing(*_: object) -> None:
    """Stand in for what would free parameters."""
