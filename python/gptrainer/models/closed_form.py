"""Networks of one parameter, with known solutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptrainer.data import DataSet
from gptrainer.models.layers import FeatureCritic, Pair
from gptrainer.models.mlp import dense


class Point(nn.Module):
    """All mass at theta (Mescheder et al. 2018)."""

    def __init__(self, theta: float = 1.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, latent: Tensor) -> Tensor:
        """Map (N, *) to (N, 1)."""
        return self.theta.expand(len(latent), 1)


class Line(Point):
    """(theta, u) with u uniform in (0, 1): a line beside the data's at 0 (Arjovsky et al. 2017, example 1)."""

    def forward(self, latent: Tensor) -> Tensor:
        """Map (N, *) to (N, 2)."""
        return torch.cat([super().forward(latent), torch.special.ndtr(latent[:, :1])], dim=1)


def build_line(data: DataSet, latent: int, width: int, batch_norm: bool) -> Pair:
    """Build the line at 1 and a critic of three hidden layers."""
    return Line(), FeatureCritic(*dense([*data.shape, width, width, width, 1], nn.ReLU()))


def build_dirac(data: DataSet, latent: int, width: int, batch_norm: bool) -> Pair:
    """Build the point at 1 and the critic psi x with psi = 1."""
    critic = nn.Linear(1, 1, bias=False)
    nn.init.ones_(critic.weight)
    return Point(), critic
