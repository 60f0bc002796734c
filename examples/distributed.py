"""WGAN-GP with a critic on several processes: replicated by DDP, or its weights sharded by fully_shard (FSDP2).

Every process draws the joint batch from one seed and keeps its rows. ``CriticLoss`` and the penalties are called as on
one process; DDP or FSDP averages the gradients in backward. Before training, the gradients are compared with those of
one process that has an undistributed copy of the critic and the whole batch.

    torchrun --nproc-per-node 2 examples/distributed.py                  # DDP
    torchrun --nproc-per-node 2 examples/distributed.py --engine fsdp
    python examples/distributed.py                                       # one process

Writes the curves to ``distributed.csv``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gpkernels as gpk

BATCH = 64  # of all processes together, which their number divides


def mlp(*sizes: int) -> nn.Sequential:
    """Return an MLP in double precision, so that the comparison is of formulas, not of rounding."""
    blocks = [nn.Sequential(nn.Linear(a, b), nn.LeakyReLU(0.2)) for a, b in pairwise(sizes[:-1])]
    return nn.Sequential(*blocks, nn.Linear(sizes[-2], sizes[-1])).double()


def distributed(critic: nn.Sequential, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(critic)
    for block in critic:
        fully_shard(block, reshard_after_forward=True)
    fully_shard(critic)
    return critic


def ring(n: int) -> Tensor:
    """Draw points of a ring."""
    angle = 2 * math.pi * torch.rand(n, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2, dtype=torch.float64)


def whole(x: Tensor) -> Tensor:
    """Return all of a tensor, of which each process may have a part."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def mean(value: Tensor) -> float:
    """Average a number over the processes."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def difference(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference, as a share of the largest entry."""
    scale = max(float(g.abs().max()) for g in exact)
    return max(float((whole(a) - b).abs().max()) for a, b in zip(found, exact, strict=True)) / scale


def train(options: argparse.Namespace) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if BATCH % size:
        raise SystemExit(f"expected a number of processes that divides {BATCH}, got {size}")
    own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)

    generator, single = mlp(2, 64, 64, 2), mlp(2, 64, 64, 1)
    critic = distributed(copy.deepcopy(single), options.engine)
    critic_loss = gpk.CriticLoss(critic)
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    generator_optimiser = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        """Draw the joint batch: real and generated samples, and the weights of their interpolates."""
        with torch.no_grad():
            fake = generator(torch.randn(BATCH, 2, dtype=torch.float64))
        return ring(BATCH), fake, torch.rand(BATCH, dtype=torch.float64)

    real, fake, eps = draw()
    gpk.CriticLoss(single)(real, fake, eps=eps).loss.backward()
    critic_loss(real[own], fake[own], eps=eps[own]).loss.backward()
    error = difference(*[[p.grad for p in m.parameters() if p.grad is not None] for m in (critic, single)])
    if rank == 0:
        print(f"{options.engine}, processes: {size}, difference of gradients from one process: {error:.1e}", flush=True)

    curves = []
    for step in range(1, options.steps + 1):
        for _ in range(5):
            real, fake, eps = draw()
            parts = critic_loss(real[own], fake[own], eps=eps[own])
            critic_optimiser.zero_grad()
            parts.loss.backward()
            critic_optimiser.step()
        noise = torch.randn(BATCH, 2, dtype=torch.float64)
        loss = gpk.wgan_generator_loss(critic(generator(noise[own])))
        generator_optimiser.zero_grad()
        loss.backward()
        for p in generator.parameters():  # it is small: every process has all of it
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad.div_(size)
        generator_optimiser.step()
        curves.append((step, -mean(parts.adversarial), mean(parts.penalty)))
        if rank == 0 and step % max(1, options.steps // 5) == 0:
            print(f"step {step}: Wasserstein estimate {curves[-1][1]:.4f}, penalty {curves[-1][2]:.4f}", flush=True)
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "distributed.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "wasserstein", "penalty"), *curves])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--steps", type=int, default=500, help="generator steps (default: 500)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)  # the same weights and samples in every process
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        store = f"file://{tempfile.mkdtemp()}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    train(options)
    dist.destroy_process_group()  # once nothing is left that uses it


if __name__ == "__main__":
    main()
