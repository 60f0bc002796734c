"""Distributions in the plane, and one on the line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Draw = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Mixture:
    """Equally likely Gaussians of one standard deviation. centres: (modes, 2)."""

    centres: Tensor
    sigma: float

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw (n, 2)."""
        modes = torch.randint(len(self.centres), (n,), generator=generator)
        return self.centres[modes] + self.sigma * torch.randn(n, 2, generator=generator)


def circle(modes: int, radius: float) -> Tensor:
    """Evenly spaced centres, (modes, 2), the first of them at (radius, 0)."""
    angles = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)


def grid(side: int, spacing: float) -> Tensor:
    """Centres of a square grid about the origin, (side * side, 2)."""
    axis = spacing * (torch.arange(side) - (side - 1) / 2)
    return torch.cartesian_prod(axis, axis)


def swiss_roll(n: int, generator: torch.Generator) -> Tensor:
    """Draw (n, 2): scikit-learn's roll seen from its end, over 7.5."""
    from sklearn.datasets import make_swiss_roll

    seed = int(torch.randint(2**31, (), generator=generator))
    points, _ = make_swiss_roll(n, noise=0.25, random_state=seed)
    return torch.tensor(points[:, [0, 2]] / 7.5, dtype=torch.float32)


def segment(n: int, generator: torch.Generator) -> Tensor:
    """Draw (n, 2): (0, u) with u uniform in [0, 1), one of the parallel lines (Arjovsky et al. 2017, example 1)."""
    heights = torch.rand(n, generator=generator)
    return torch.stack([torch.zeros(n), heights], dim=1)


def origin(n: int, generator: torch.Generator) -> Tensor:
    """Return (n, 1): the data of the Dirac-GAN (Mescheder et al. 2018)."""
    return torch.zeros(n, 1)


# The first two are scaled as in the WGAN-GP code, the ring is that of unrolled GANs.
MIXTURES = {
    "8gaussians": Mixture(circle(8, 2.0 / 1.414), 0.02 / 1.414),
    "25gaussians": Mixture(grid(5, 2.0 / 2.828), 0.05 / 2.828),
    "ring": Mixture(circle(8, 1.0), 0.01),
}
POINTS: dict[str, Draw] = {
    **{name: mixture.sample for name, mixture in MIXTURES.items()},
    "swissroll": swiss_roll,
    "lines": segment,
    "dirac": origin,
}
