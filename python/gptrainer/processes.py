"""The processes that train one run together, and the random numbers of their joined batch."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn.parallel import DistributedDataParallel

import gpkernels


class Processes:
    """As ``torchrun`` has started them; one alone without it. Each has every size-th row of a joined batch."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Meet the others, if ``torchrun`` has started any."""
        if not dist.is_torchelastic_launched():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and speaks."""
        return self.rank == 0

    def say(self, note: str) -> None:
        """A line on stderr, once."""
        if self.writes:
            print(note, file=sys.stderr)

    def leave(self) -> None:
        """The end of working together."""
        if self.size > 1:
            dist.destroy_process_group()

    def rows(self, joined: Tensor) -> Tensor:
        """This process's rows."""
        return joined[self.rank :: self.size] if self.size > 1 else joined

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, with its weights' gradients averaged over the processes in backward."""
        return DistributedDataParallel(module) if self.size > 1 else module

    def mean(self, values: Tensor) -> Tensor:
        """The mean of what each process has, without a graph."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def differentiable_mean(self, values: Tensor) -> Tensor:
        """The mean of what each process has, with a graph through all of them."""
        if self.size == 1:
            return values
        everyone = dist.group.WORLD
        assert everyone is not None
        return all_reduce(values, "sum", everyone) / self.size

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values


def local_device(name: str) -> torch.device:
    """The device of this process: each process of a machine has a GPU of its own."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


class Draws:
    """Random numbers that are the same however many processes share a batch: drawn for all of it, kept by row."""

    def __init__(self, processes: Processes, seed: int, device: torch.device) -> None:
        self.processes = processes
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, n: int, size: int) -> Tensor:
        """N(0, 1), (n / processes, size)."""
        return self.processes.rows(torch.randn(n, size, generator=self.generator, device=self.device))

    def uniform(self, like: Tensor) -> Tensor:
        """U[0, 1), one for each row."""
        n = len(like) * self.processes.size
        return self.processes.rows(torch.rand(n, generator=self.generator, device=self.device)).to(like.dtype)

    def noisy(self, x: Tensor, sigma: float) -> Tensor:
        """x + sigma N(0, 1), differentiable in x."""
        size = self.processes.size
        joined = x.repeat_interleave(size, dim=0) if size > 1 else x  # own rows are where they are in the joined batch
        return self.processes.rows(gpkernels.add_instance_noise(joined, sigma, generator=self.generator))
