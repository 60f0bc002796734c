"""Critics to measure, with their batch shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gpkernels.zoo import ResidualCritic, SkipField, dcgan, mlp


@dataclass(frozen=True)
class Case:
    """make: constructs the critic. shape: of its batch. field: an SDF, trained by the eikonal loss, without scores."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    field: bool = False


def in_scale(critic: nn.Sequential) -> nn.Sequential:
    """Apply He's initialisation: with PyTorch's, gradients of 120 layers vanish to denormals, which are slow."""
    for layer in critic:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return critic


CASES: dict[str, Case] = {
    "MLP 2-64x3-1, N 64": Case(lambda: mlp(2, 64, 64, 64, 1), (64, 2)),
    "MLP 2-128x3-1, N 256": Case(lambda: mlp(2, 128, 128, 128, 1), (256, 2)),
    "MLP 2-512x3-1, N 256": Case(lambda: mlp(2, 512, 512, 512, 1), (256, 2)),
    "AMP 105-1024-512-1, N 1024": Case(lambda: mlp(105, 1024, 512, 1), (1024, 105)),
    "DCGAN 32 px, N 64": Case(lambda: dcgan(3, 64, 32), (64, 3, 32, 32)),
    "residual, N 8": Case(lambda: ResidualCritic(64, 32), (8, 3, 32, 32)),
    "residual, N 32": Case(lambda: ResidualCritic(64, 32), (32, 3, 32, 32)),
    "residual LayerNorm, N 8": Case(lambda: ResidualCritic(64, 32, "layer_norm"), (8, 3, 32, 32)),
    "residual GroupNorm(1), N 8": Case(lambda: ResidualCritic(64, 32, "group_norm"), (8, 3, 32, 32)),
    "SDF 3-256x8-1 softplus, N 4096": Case(lambda: SkipField(256, 8, 100.0), (4096, 3), field=True),
}
