"""Critics of many kinds, in addition to the measured ones, and their losses in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpkernels.zoo import (
    NORMS,
    ResidualCritic,
    SkipField,
    dcgan,
    first,
    mlp,
    plain_loss,
    plain_penalty,
    plain_points,
)

__all__ = [
    "ACTIVATIONS", "NORMS", "PIECEWISE", "Featured", "MaxPooled", "Noisy", "Odd", "ResidualCritic", "SkipField",
    "TwoHeads", "dcgan", "first", "mlp", "plain_loss", "plain_penalty", "plain_points"
]  # fmt: skip

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_in_place": lambda: nn.ReLU(True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu_in_place": lambda: nn.LeakyReLU(0.2, True),
    "hardtanh": nn.Hardtanh,
    "relu6": lambda: nn.ReLU6(True),
    "prelu": nn.PReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=3),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "elu": nn.ELU,
}
PIECEWISE = ("relu", "relu_in_place", "leaky_relu", "leaky_relu_in_place", "hardtanh", "relu6", "prelu")


class MaxPooled(nn.Module):
    """Convolutions with max pooling, written with functions."""

    def __init__(self, channels: int = 3, dim: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, 2 * dim, 3, padding=1)
        self.top = nn.LazyLinear(1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.leaky_relu(self.conv2(x), 0.1), 3, stride=2, padding=1)
        return self.top(x.view(x.size(0), -1)).squeeze(1)


class Featured(nn.Module):
    """Scores and features, with dropout, as CT-GAN's critics have."""

    def __init__(self, width: int = 16, p: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.LeakyReLU(0.2), nn.Dropout(p), nn.Linear(width, width))
        self.top = nn.Linear(width, 1)
        self.p = p

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.dropout(F.leaky_relu(self.body(x), 0.2), self.p, self.training)
        return self.top(features), features


class Noisy(nn.Module):
    """A critic whose passes differ by noise that a test can fix."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic, self.drawn, self.fixed = critic, [], []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.fixed.pop(0) if self.fixed else 0.3 * torch.randn_like(x)
        self.drawn.append(noise)
        return self.critic(x + noise)


class TwoHeads(nn.Module):
    """Scores, and the output of another head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other, self.top = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.top(h), self.other(h).tanh().cumprod(1)


class Odd(nn.Module):
    """A critic with a call that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.special.i0e(self.first(x)))
