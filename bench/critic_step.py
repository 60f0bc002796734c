"""The critic step beside eager PyTorch, interleaved, minimum of N in one process; one thread and its CPU time.

    .venv/bin/python bench/critic_step.py [name ...] [--rounds N] [--threads T]

``limit`` is eager's time over that of the bare products and convolutions that a penalty or a step cannot do without,
called one by one in the same run. Peak memory is what the step allocates beyond what was there, by the profiler's
count, as a share of eager's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import gpkernels as gpk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from critics import ResidualCritic, SkipField, dcgan, mlp, plain_loss, plain_penalty, plain_points

CASES: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "MLP 2-64x3-1, N 64": lambda: (mlp(2, 64, 64, 64, 1), (64, 2)),
    "MLP 2-128x3-1, N 256": lambda: (mlp(2, 128, 128, 128, 1), (256, 2)),
    "MLP 2-512x3-1, N 256": lambda: (mlp(2, 512, 512, 512, 1), (256, 2)),
    "AMP 105-1024-512-1, N 1024": lambda: (mlp(105, 1024, 512, 1), (1024, 105)),
    "DCGAN 32 px, N 64": lambda: (dcgan(3, 64, 32), (64, 3, 32, 32)),
    "residual, N 8": lambda: (ResidualCritic(64, 32), (8, 3, 32, 32)),
    "residual, N 32": lambda: (ResidualCritic(64, 32), (32, 3, 32, 32)),
    "residual LayerNorm, N 8": lambda: (ResidualCritic(64, 32, "layer_norm"), (8, 3, 32, 32)),
    "residual GroupNorm(1), N 8": lambda: (ResidualCritic(64, 32, "group_norm"), (8, 3, 32, 32)),
    "SDF 3-256x8-1 softplus, N 4096": lambda: (SkipField(256, 8, 100.0), (4096, 3)),
}


class Products(TorchDispatchMode):
    """Collects the products and convolutions that a call makes, to make them again without what is around them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._overloadpacket in flop_registry:
            again = [a.detach() if isinstance(a, Tensor) else a for a in args]
            if func in (torch.ops.aten.addmm_.default,):
                again[0] = again[0].clone()
            self.calls.append(lambda: func(*again, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def fastest(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Least time of each call in milliseconds, taken turn by turn: CPU time of one thread, wall time of several."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = clock()
            call()
            best[i] = min(best[i], clock() - start)
    return [1e3 * seconds for seconds in best]


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call holds at most, beyond what was there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def measure(name: str, rounds: int) -> str:
    torch.manual_seed(0)
    critic, shape = CASES[name]()
    field = name.startswith("SDF")
    real, fake, eps = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
    points, weights, loss = plain_points(real, fake, eps, "wgan-gp"), list(critic.parameters()), gpk.CriticLoss(critic)

    def ours_penalty() -> None:
        penalty = gpk.eikonal_loss(critic, real) if field else gpk.gradient_penalty(critic, real, fake, eps=eps)
        torch.autograd.grad(penalty, weights)

    def eager_penalty() -> None:
        torch.autograd.grad(plain_penalty(critic, real if field else points), weights, allow_unused=True)

    def ours_step() -> None:
        torch.autograd.grad(loss(real, fake, eps=eps).loss, weights)

    def eager_step() -> None:
        torch.autograd.grad(plain_loss(critic, real, fake, eps), weights)

    with Products() as needed_by_penalty:
        ours_penalty()
    rows = [(ours_penalty, eager_penalty, needed_by_penalty.calls)]
    if not field:
        with Products() as needed_by_step:
            ours_step()
        rows.append((ours_step, eager_step, needed_by_step.calls))
    cells = []
    for ours, eager, products in rows:

        def bare(products: list[Callable[[], object]] = products) -> None:
            with torch.no_grad():
                for call in products:
                    call()

        mine, theirs, least = fastest([ours, eager, bare], rounds)
        memory = peak(ours) / max(1, peak(eager))
        cells.append(
            f"{theirs / mine:5.2f} ({theirs / least:4.2f}) {theirs:8.2f} -> {mine:8.2f} ms, memory {memory:4.2f}"
        )
    return f"{name:32s} " + " | ".join(cells)


def measure_real_part(rounds: int) -> str:
    """What R1 and the loss of the real data cost: a step with R1, less half of a step without a penalty."""
    critic, shape = dcgan(3, 64, 32), (64, 3, 32, 32)
    real, fake, eps = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
    weights, calls = list(critic.parameters()), []
    for penalty in ("r1", "none"):
        loss = gpk.CriticLoss(critic, penalty=penalty)
        calls.append(lambda loss=loss: torch.autograd.grad(loss(real, fake).loss, weights))
        calls.append(
            lambda kind=penalty: torch.autograd.grad(plain_loss(critic, real, fake, eps, penalty=kind), weights)
        )
    ours, eager, ours_plain, eager_plain = fastest(calls, rounds)
    mine, theirs = ours - ours_plain / 2, eager - eager_plain / 2
    return f"{'R1 + real loss, DCGAN, N 64':32s} {theirs / mine:5.2f}        {theirs:8.2f} -> {mine:8.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of case names")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads; eager over ours (limit), penalty | step")
    for name in CASES:
        if not options.names or any(part.lower() in name.lower() for part in options.names):
            print(measure(name, options.rounds), flush=True)
    if not options.names or "r1" in (part.lower() for part in options.names):
        print(measure_real_part(options.rounds), flush=True)


if __name__ == "__main__":
    main()
