"""The processes that train one run, and the random numbers of their joint batch."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn.parallel import DistributedDataParallel

import gpkernels


class Processes(NamedTuple):
    """The processes that ``torchrun`` started, or a single one. Each has every size-th row of a joint batch."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Join the process group, if ``torchrun`` started one."""
        if not dist.is_torchelastic_launched():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def writes(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def say(self, note: str) -> None:
        """Print a line on stderr, from one process."""
        if self.writes:
            print(note, file=sys.stderr)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()

    def rows(self, joint: Tensor) -> Tensor:
        """Select this process's rows."""
        return joint[self.rank :: self.size] if self.size > 1 else joint

    def parallel(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that backward averages its gradients over the processes."""
        return DistributedDataParallel(module) if self.size > 1 else module

    def mean(self, values: Tensor) -> Tensor:
        """Average over the processes; a graph goes through all of them."""
        if self.size == 1 or dist.group.WORLD is None:
            return values
        return all_reduce(values, "sum", dist.group.WORLD) / self.size

    def gather(self, value: Any) -> list[Any]:
        """Gather the values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


ALONE = Processes()


def local_device(name: str) -> torch.device:
    """Device of this process: each process on a machine has its own GPU."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


class Draws:
    """Random numbers that do not depend on the number of processes: drawn for the joint batch, then split by row."""

    def __init__(self, processes: Processes, seed: int, device: torch.device) -> None:
        self.processes = processes
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, n: int, size: int) -> Tensor:
        """Draw N(0, 1), (n / processes, size)."""
        return self.processes.rows(torch.randn(n, size, generator=self.generator, device=self.device))

    def uniform(self, like: Tensor) -> Tensor:
        """Draw U[0, 1), one for each row."""
        n = len(like) * self.processes.size
        return self.processes.rows(torch.rand(n, generator=self.generator, device=self.device)).to(like.dtype)

    def noisy(self, x: Tensor, sigma: float) -> Tensor:
        """Compute x + sigma N(0, 1), differentiable in x."""
        size = self.processes.size
        joint = x.repeat_interleave(size, dim=0) if size > 1 else x  # own rows are where they are in the joint batch
        return self.processes.rows(gpkernels.add_instance_noise(joint, sigma, generator=self.generator))
