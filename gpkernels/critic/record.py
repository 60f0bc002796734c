"""Recording a critic, and remembering which critics cannot be recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpkernels.critic.registry import RULES
from gpkernels.critic.tape import Gradients, Node, NoRule, Tape, unwrapped

_refused: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()


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
    refused attempt drew, and buffers it changed, are given back. ``onto`` collects the gradients of several tapes.
    """
    critic = unwrapped(critic)
    module = isinstance(critic, nn.Module)
    if module and critic in _refused:
        reason = _refused[critic].get(_layers_of(critic))
        if reason is not None:
            raise NoRule(reason)
    state = _State(critic, x.device)
    try:
        tape = Tape(RULES, x, wants_input, onto)
        with torch.enable_grad(), tape:
            output = critic(x, *args, **(kwargs or {}))
        tape.finish()
    except NoRule as refusal:
        state.restore()
        if module:
            _refused.setdefault(critic, {})[_layers_of(critic)] = str(refusal)
        raise
    except Exception as error:  # perhaps of a batch that is not the caller's: autograd's way will tell
        state.restore()
        raise NoRule(f"the critic raised {type(error).__name__}: {error}") from error
    return tape, output


def _layers_of(critic: nn.Module) -> tuple[Any, ...]:
    """What must stay for a refusal to stay: the layers and their modes."""
    return tuple((type(module), module.training) for module in critic.modules())


class _State:
    """What a forward pass may change: random numbers and buffers."""

    def __init__(self, critic: Any, device: torch.device) -> None:
        self.device = device
        self.random = torch.get_rng_state()
        self.on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        buffers = list(critic.buffers()) if isinstance(critic, nn.Module) else []
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def restore(self) -> None:
        torch.set_rng_state(self.random)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)


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
