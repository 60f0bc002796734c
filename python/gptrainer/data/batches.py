"""Endless batches that resume from a state bit for bit."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gpkernels.arguments import UserError
from gptrainer.data.images import Indexed
from gptrainer.data.points import Draw
from gptrainer.processes import ALONE, Processes

AHEAD = 2


class ShuffledBatches:
    """Full batches of samples, shuffled in each epoch, with U[0, noise) added to each element."""

    def __init__(
        self, samples: Indexed, batch_size: int, seed: int, processes: Processes = ALONE, *, noise: float = 0.0
    ) -> None:
        if batch_size > len(samples):
            raise UserError(f"--batch-size: expected at most the {len(samples)} samples of the data, got {batch_size}")
        self.samples, self.batch_size, self.processes, self.noise = samples, batch_size, processes, noise
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next(self) -> Tensor:
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.samples), generator=self.generator)
            self.position = 0
        chosen = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        batch = self.samples[self.processes.rows(chosen)]
        if self.noise:  # drawn for the images of all processes
            noise = torch.rand(self.batch_size, *batch.shape[1:], generator=self.generator)
            batch.add_(self.processes.rows(noise), alpha=self.noise)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["order"]) not in (0, len(self.samples)):
            raise ValueError(f"expected the order of {len(self.samples)} samples, got one of {len(state['order'])}")
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]


class SampledBatches:
    """Fresh samples of a distribution in every batch."""

    def __init__(
        self, draw: Draw, batch_size: int, seed: int, device: torch.device, processes: Processes = ALONE
    ) -> None:
        self.draw, self.batch_size, self.device, self.processes = draw, batch_size, device, processes
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        return self.processes.rows(self.draw(self.batch_size, self.generator)).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Prefetched:
    """Batches that a thread prepares in advance. The state is that of the last batch returned."""

    def __init__(self, batches: ShuffledBatches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: deque[Future[tuple[Tensor, dict[str, Any]]]] = deque()
        self.state = batches.state_dict()

    def next(self) -> Tensor:
        while len(self.ahead) <= AHEAD:
            self.ahead.append(self.thread.submit(lambda: (self.batches.next(), self.batches.state_dict())))
        batch, self.state = self.ahead.popleft().result()
        return batch.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self.ahead:
            self.ahead.popleft().exception()  # waits; the batch is discarded
        self.batches.load_state_dict(state)
        self.state = state


Batches = ShuffledBatches | SampledBatches | Prefetched
