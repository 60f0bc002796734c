"""Recording a critic, and remembering which critics cannot be recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from gpkernels.critic.registry import RULES
from gpkernels.critic.tape import Gradients, Node, NoRule, Tape, unwrapped

_recordable: WeakSet[Any] = WeakSet()
_refused: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


def record(
    critic: Any,
    x: Tensor,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    wants_input: bool = False,
    onto: Gradients | None = None,
) -> tuple[Tape, Any]:
    """Run the critic on a batch of its own and return the tape and the output; NoRule where that cannot be done.

    What was refused once is refused at once as long as the critic consists of the same layers; random numbers that a
    refused attempt drew are given back. ``onto`` collects the gradients of several tapes.
    """
    critic = unwrapped(critic)
    module = isinstance(critic, nn.Module)
    if module and critic in _refused:
        layers, reason = _refused[critic]
        if layers == _layers_of(critic):
            raise NoRule(reason)
    state = None if module and critic in _recordable else _random_state(x.device)
    try:
        tape = Tape(RULES, x, wants_input, onto)
        with torch.enable_grad(), tape:
            output = critic(x, *args, **(kwargs or {}))
        tape.finish()
    except NoRule as refusal:
        if state is not None:
            _restore(state, x.device)
        if module:
            _refused[critic] = _layers_of(critic), str(refusal)
        raise
    if module:
        _recordable.add(critic)
    return tape, output


def _layers_of(critic: nn.Module) -> tuple[Any, ...]:
    """What must stay for a refusal to stay: the layers and their modes."""
    return tuple((type(module), module.training) for module in critic.modules())


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def scores_of(output: Any) -> Tensor:
    """The scores in a critic's output: a tensor, or the first of a tuple."""
    scores = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(scores, Tensor):
        raise TypeError(f"critic: expected scores as a tensor, or first in a tuple, got {type(output).__name__}")
    return scores


def node_of_scores(tape: Tape, x: Tensor) -> Node:
    node = tape.node_of(x)
    if node is None:
        raise NoRule("the scores were not computed on the tape")
    return node
