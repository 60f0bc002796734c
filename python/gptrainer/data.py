"""The data sets, and endless seeded batches of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gptrainer.errors import UserError

RING_MODES = 8
RING_SCALE = 1.414
RING_RADIUS = 2.0 / RING_SCALE
RING_SIGMA = 0.02 / RING_SCALE


class Batches(Protocol):
    """Endless batches that can go on where they were."""

    def next(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ShuffledBatches:
    """Full batches of a tensor, shuffled anew each epoch; what does not fill a batch waits for another epoch."""

    def __init__(self, samples: Tensor, batch_size: int, seed: int) -> None:
        if batch_size > len(samples):
            raise UserError(f"--batch-size: expected at most the {len(samples)} samples of the data, got {batch_size}")
        self.samples = samples
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next(self) -> Tensor:
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.samples), generator=self.generator)
            self.position = 0
        chosen = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return self.samples[chosen.to(self.samples.device)]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]


class SampledBatches:
    """Fresh samples of a distribution in every batch."""

    def __init__(
        self, sample: Callable[[int, torch.Generator], Tensor], batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.sample = sample
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def next(self) -> Tensor:
        return self.sample(self.batch_size, self.generator).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


@dataclass(frozen=True)
class LabelledImages:
    """images: (N, C, H, W) in [0, 1]; labels: (N,), from 0 to classes - 1."""

    images: Tensor
    labels: Tensor
    classes: int


def load_digits() -> LabelledImages:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.tensor(bunch.images, dtype=torch.float32).div_(16).unsqueeze(1)
    return LabelledImages(images, torch.tensor(bunch.target, dtype=torch.int64), 10)


def ring_centres() -> Tensor:
    """The eight modes, (8, 2)."""
    angles = torch.arange(RING_MODES) * (2 * math.pi / RING_MODES)
    return RING_RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """(n, 2): centres on a ring of radius 2, plus .02 N(0, 1), all over 1.414, as in the WGAN-GP code."""
    modes = torch.randint(RING_MODES, (n,), generator=generator)
    return ring_centres()[modes] + RING_SIGMA * torch.randn(n, 2, generator=generator)


def load_batches(data: str, batch_size: int, seed: int, device: torch.device) -> Batches:
    """The training batches of a data set, by its name."""
    if data == "digits":
        return ShuffledBatches(load_digits().images.to(device), batch_size, seed)
    return SampledBatches(eight_gaussians, batch_size, seed, device)
