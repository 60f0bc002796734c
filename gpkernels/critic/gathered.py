"""Critics with parameters that ``fully_shard`` distributes: gathered in a step, their gradients reduced in backward.

FSDP frees gathered parameters after a module's forward pass and again after its backward pass, while a penalty needs
them for longer. A step keeps them from a module's first call until its end. The gradients of a step are those of the
gathered parameters: FSDP itself reduces and scatters them at the end of the backward pass that delivers them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkernels.private import fsdp_gather, fsdp_groups, fsdp_reduces, fsdp_state, tree_leaves

T = TypeVar("T")
SHARDING = "torch.distributed.fsdp"  # without this module no parameters are distributed


def with_gathered(run: Callable[[], T], critic: Any = None) -> T:
    """Return what a step returns, with FSDP's parameters gathered in it and reduced in backward.

    critic: where the graph of the results reads parameters in backward, the critic that it is of.
    """
    if not may_be_sharded():
        return run()
    with _Gathered(critic) as parameters:
        found = run()
    parameters.reduce_from(found)
    return found


class _Gathered:
    """Context manager in which the parameters of FSDP's modules are kept gathered, once a module has been called.

    critic: as in ``with_gathered``; backward gathers the parameters again.
    """

    def __init__(self, critic: Any = None) -> None:
        self._critic, self._thread, self._stack = critic, get_ident(), ExitStack()
        self._states: dict[Any, None] = {}

    def __enter__(self) -> _Gathered:
        handle = register_module_forward_pre_hook(self._before)
        self._stack.callback(handle.remove)
        if self._critic is not None and _is_sharded(self._critic):
            self._stack.enter_context(saved_tensors_hooks(lambda x: x, self._read))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        if get_ident() != self._thread or (state := fsdp_state(module)) is None or state in self._states:
            return
        self._states[state] = None
        for group in fsdp_groups(state):
            if "reshard" not in vars(group):  # no context around this one keeps it
                group.reshard = group.post_backward = _nothing
                self._stack.callback(_free, group)

    def _read(self, x: Tensor) -> Tensor:
        """Return a saved tensor; gather all parameters if it is one that has been freed."""
        if x.numel() and not x.untyped_storage().size():
            for state in self._states:
                fsdp_reduces(state)
                fsdp_gather(state)
        return x

    def reduce_from(self, results: Any) -> None:
        """Let FSDP reduce the gradients that backward from any of the results leaves at gathered parameters."""
        for x in tree_leaves(results) if self._states else ():
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self._at_backward)

    def _at_backward(self, cotangent: Tensor) -> None:
        for state in self._states:
            fsdp_reduces(state)


def may_be_sharded() -> bool:
    """Whether there may be parameters that ``fully_shard`` distributes."""
    return SHARDING in sys.modules and torch.distributed.is_initialized()


def _is_sharded(critic: Any) -> bool:
    """Whether FSDP has parameters of a module; of any other callable, whether it may have."""
    return not isinstance(critic, torch.nn.Module) or any(fsdp_state(m) is not None for m in critic.modules())


def _nothing(*_: object) -> None:
    """Stand in for what would free parameters."""


def _free(group: Any) -> None:
    """Free parameters as FSDP would have done after the forward pass, and from now on."""
    del group.reshard, group.post_backward
    if group._reshard_after_forward:
        group.reshard()
