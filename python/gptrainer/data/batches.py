"""Endless batches that can go on where they were, bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from gptrainer.errors import UserError

Shard = tuple[int, int]
"""(rank, world): the process and how many there are."""
AHEAD = 2


class Batches(Protocol):
    """Endless batches that can go on where they were."""

    def next(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Samples(Protocol):
    """What can be indexed by a tensor of indices: a tensor, or images on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor, /) -> Tensor: ...


class ShuffledBatches:
    """Full batches of samples, shuffled anew each epoch; what does not fill a batch waits for another epoch."""

    def __init__(self, samples: Samples, batch_size: int, seed: int, shard: Shard = (0, 1)) -> None:
        if batch_size > len(samples):
            raise UserError(f"--batch-size: expected at most the {len(samples)} samples of the data, got {batch_size}")
        self.samples = samples
        self.batch_size = batch_size
        self.shard = shard
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next(self) -> Tensor:
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.samples), generator=self.generator)
            self.position = 0
        chosen = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return self.samples[_share(chosen, self.shard)]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["order"]) not in (0, len(self.samples)):
            raise ValueError(f"the order is one of {len(state['order'])} samples, and there are {len(self.samples)}")
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]


class SampledBatches:
    """Fresh samples of a distribution in every batch."""

    def __init__(
        self,
        sample: Callable[[int, torch.Generator], Tensor],
        batch_size: int,
        seed: int,
        device: torch.device,
        shard: Shard = (0, 1),
    ) -> None:
        self.sample = sample
        self.batch_size = batch_size
        self.shard = shard
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def next(self) -> Tensor:
        return _share(self.sample(self.batch_size, self.generator), self.shard).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Dequantised:
    """Batches with noise in [0, width) on each pixel, so that its values are no longer on a grid."""

    def __init__(self, batches: Batches, width: float, batch_size: int, seed: int, shard: Shard) -> None:
        self.batches = batches
        self.width = width
        self.batch_size = batch_size
        self.shard = shard
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        batch = self.batches.next()
        noise = torch.rand(self.batch_size, *batch.shape[1:], generator=self.generator)  # of all processes' images
        return batch.add_(_share(noise, self.shard), alpha=self.width)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches.state_dict(), "noise": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state["batches"])
        self.generator.set_state(state["noise"])


class Prefetched:
    """Batches that a thread makes ahead of their use. The state is that of the last batch given, not of those ahead."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: deque[Future[tuple[Tensor, dict[str, Any]]]] = deque()
        self.state = batches.state_dict()

    def next(self) -> Tensor:
        while len(self.ahead) < AHEAD:
            self.ahead.append(self.thread.submit(self._make))
        batch, self.state = self.ahead.popleft().result()
        self.ahead.append(self.thread.submit(self._make))
        return batch.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self.ahead:
            self.ahead.popleft().exception()  # waits; what was made too early is dropped
        self.batches.load_state_dict(state)
        self.state = state

    def _make(self) -> tuple[Tensor, dict[str, Any]]:
        return self.batches.next(), self.batches.state_dict()


def _share(rows: Tensor, shard: Shard) -> Tensor:
    rank, world = shard
    return rows[rank::world]
