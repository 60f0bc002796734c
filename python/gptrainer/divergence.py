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
            broken = " and ".join(_broken(networks)) or "all weights are finite"
            raise UserError(f"the run diverged: {name.replace('_', ' ')} is {value:g} at step {step}, {broken}")


def check_weights(networks: Mapping[str, nn.Module], step: int) -> None:
    """Raise UserError naming the network and the weight if a weight is not finite."""
    broken = _broken(networks)
    if broken:
        raise UserError(f"the run diverged at step {step}: {' and '.join(broken)}")


def _broken(networks: Mapping[str, nn.Module]) -> list[str]:
    """Name the networks with weights that are not finite, with the first of these."""
    bad = {name: [w for w, p in net.state_dict().items() if not p.isfinite().all()] for name, net in networks.items()}
    return [f"the {name}'s weights are not finite (first {weights[0]})" for name, weights in bad.items() if weights]
