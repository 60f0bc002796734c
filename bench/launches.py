"""Count launches and bytes of critic steps and ops on a GPU, without one.

    .venv/bin/python bench/launches.py [--ops] [--csv FILE]
    .venv/bin/python bench/launches.py --measured [--csv FILE]

Counts are taken on CPU tensors with emulated CUDA kernels (see tests/launches.py); the times are predicted from the
bytes and each device's memory bandwidth alone, without products, launches and caches. With --measured the steps run on
a GPU at full size, and PyTorch's profiler counts the launches.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gpkernels as gpk
from gpkernels.bench.cases import CASES
from gpkernels.zoo import plain_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from launches import launches_of

BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "MI300X": 5.3e12}  # bytes per second, of SXM and OAM parts
COLUMNS = ("case", "launches", "eager_launches", "megabytes", "eager_megabytes", *(f"{d}_us" for d in BANDWIDTH))


def steps(device: str = "cpu") -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Yield a WGAN-GP step with backward for each critic of the zoo: ours and plain PyTorch's."""
    cases = {name.partition(", N")[0]: case for name, case in CASES.items() if not case.field}
    for name, case in cases.items():
        critic, shape = case.make().to(device), case.shape
        if device == "cpu":
            shape = (min(shape[0], 64), *shape[1:]) if len(shape) == 2 else (4, *shape[1:])
        real, fake = (torch.randn(shape, device=device) for _ in range(2))
        eps = torch.rand(shape[0], device=device)
        loss = gpk.CriticLoss(critic, together=True)  # as on a GPU with up to 256 MB of activations
        yield (
            f"{name}, N {shape[0]}",
            lambda loss=loss, x=(real, fake), eps=eps: loss(*x, eps=eps).loss.backward(),
            lambda critic=critic, x=(real, fake), eps=eps: plain_loss(critic, *x, eps).backward(),
        )


def ops() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Yield each differentiable op with its backward, on (64, 3072); weights are 16 matrices."""
    x, y, eps = torch.randn(64, 3072, requires_grad=True), torch.randn(64, 3072), torch.rand(64, 1)
    scores = [torch.randn(64, 1, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(64, 192) for _ in range(16)]

    def penalty() -> torch.Tensor:
        return ((x.norm(2, dim=1) - 1) ** 2).mean()

    def consistency() -> torch.Tensor:
        distance = (scores[0] - scores[1]).pow(2).sum(1) + 0.1 * (x - y).pow(2).mean(1)
        return distance.clamp(min=0).mean()

    yield "interpolate", lambda: gpk.interpolate(y, y, eps[:, 0]), lambda: eps * y + (1 - eps) * y
    yield "add_instance_noise", lambda: gpk.add_instance_noise(y, 0.1), lambda: y + 0.1 * torch.randn_like(y)
    yield (
        "gradient_norm_penalty and backward",
        lambda: gpk.gradient_norm_penalty(x).backward(),
        lambda: penalty().backward(),
    )
    yield (
        "consistency_term and backward",
        lambda: gpk.consistency_term(*scores, x, y).backward(),
        lambda: consistency().backward(),
    )
    yield (
        "wgan_critic_loss and backward",
        lambda: gpk.wgan_critic_loss(*scores).backward(),
        lambda: (scores[1].mean() - scores[0].mean()).backward(),
    )
    yield "clip_weights_", lambda: gpk.clip_weights_(weights, 0.1), lambda: [w.clamp_(-0.1, 0.1) for w in weights]


def row(name: str, ours: Callable[[], Any], eager: Callable[[], Any]) -> list[Any]:
    fused, plain = launches_of(ours), launches_of(eager)
    times = [round(1e6 * fused.bytes / speed, 1) for speed in BANDWIDTH.values()]
    return [name, fused.total, plain.total, round(fused.bytes / 1e6, 2), round(plain.bytes / 1e6, 2), *times]


def measured() -> Iterator[list[Any]]:
    """Yield the launches of each step on a GPU, ours and plain PyTorch's."""
    for name, ours, eager in steps("cuda"):
        counts = []
        for call in (ours, eager):
            for _ in range(4):
                call()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                call()
                torch.cuda.synchronize()
            counts.append(sum(event.device_type == DeviceType.CUDA for event in seen.events()))
        yield [name, *counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", action="store_true", help="count single ops instead of critic steps")
    parser.add_argument("--measured", action="store_true", help="count on the available GPU")
    parser.add_argument("--csv", type=Path, help="also write the table to FILE")
    options = parser.parse_args()
    if options.measured and not torch.cuda.is_available():
        parser.error("--measured: PyTorch sees no GPU")
    torch.manual_seed(0)
    if options.measured:
        columns, rows = ("case", "launches", "eager_launches"), list(measured())
        print(f"launched on {torch.cuda.get_device_name()}")
    else:
        columns, rows = COLUMNS, [row(*case) for case in (ops() if options.ops else steps())]
        print("predicted, not measured: time of our bytes at the memory bandwidth of " + ", ".join(BANDWIDTH))
    print("  ".join([f"{columns[0]:<36}", *(f"{c:>15}" for c in columns[1:])]))
    for name, *numbers in rows:
        print("  ".join([f"{name:<36}", *(f"{n:>15}" for n in numbers)]))
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])


if __name__ == "__main__":
    main()
