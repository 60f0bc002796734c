"""Critics trained against distributions that stand still."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fit(loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer, steps: int) -> None:
    """Steps down a loss that draws its own batch in each call."""
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
