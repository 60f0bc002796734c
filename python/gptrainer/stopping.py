"""What ends a run before its last step: signals, and losses or weights that are not finite."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from torch import nn

from gpkernels.arguments import UserError

LIMIT = 1e8  # far above any loss of a run that learns


class Stopped(KeyboardInterrupt):
    """Raised where a signal has stopped a run with its state saved. args[0]: the number of the signal."""


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM as requests to stop after the step; the same signal again stops at once."""
    received: list[int] = []
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[number])
        received.append(number)

    for number in before:
        signal.signal(number, request)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_losses(losses: Mapping[str, float], step: int, networks: Mapping[str, nn.Module]) -> None:
    """Raise UserError naming the loss, the step and the weights if a loss is not finite or out of bounds."""
    for name, value in losses.items():
        if not abs(value) <= LIMIT:
            broken = " and ".join(_broken(networks)) or "all weights are finite"
            raise UserError(f"the run diverged: {name.replace('_', ' ')} is {value:g} at step {step}, {broken}")


def check_weights(networks: Mapping[str, nn.Module], step: int) -> None:
    """Raise UserError naming the network and the weight if a weight is not finite."""
    if broken := _broken(networks):
        raise UserError(f"the run diverged at step {step}: {' and '.join(broken)}")


def _broken(networks: Mapping[str, nn.Module]) -> list[str]:
    """Name the networks with weights that are not finite, with the first of these."""
    bad = {name: [w for w, p in net.state_dict().items() if not p.isfinite().all()] for name, net in networks.items()}
    return [f"the {name}'s weights are not finite (first {weights[0]})" for name, weights in bad.items() if weights]
