"""Detection of runs that diverge."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from gpkernels.arguments import UserError

LIMIT = 1e8  # far above any loss of a run that learns


def check_losses(losses: Mapping[str, float], step: int, networks: Mapping[str, nn.Module]) -> None:
    """Raise UserError naming the loss, the step and the weights if a loss is not finite or out of bounds."""
    for name, value in losses.items():
        if not math.isfinite(value) or abs(value) > LIMIT:
            what = name.replace("_", " ")
            raise UserError(f"the run diverged: {what} is {value:g} at step {step}, {_weights(networks)}")


def check_weights(networks: Mapping[str, nn.Module], step: int) -> None:
    """Raise UserError naming the network and the weight if a weight is not finite."""
    if any(_first_broken(network) for network in networks.values()):
        raise UserError(f"the run diverged at step {step}: {_weights(networks)}")


def _weights(networks: Mapping[str, nn.Module]) -> str:
    broken = {name: weight for name, network in networks.items() if (weight := _first_broken(network))}
    if not broken:
        return "all weights are finite"
    return " and ".join(f"the {name}'s weights are not finite (first {weight})" for name, weight in broken.items())


def _first_broken(network: nn.Module) -> str | None:
    return next((name for name, p in network.state_dict().items() if not p.isfinite().all()), None)
