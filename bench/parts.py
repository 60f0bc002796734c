"""Measure what each part of the implementation buys, by switching it off.

    .venv/bin/python bench/parts.py [--part PART] [--rounds N] [--processes N] [--csv FILE]

For small critics, eager PyTorch's time over ours for a WGAN-GP step with its weight gradients (for `_direct`, of single
ops), with everything on and with one part off. Each figure is the median of three processes, in which eager
and ours are interleaved: the minimum CPU time on one thread.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

import gpkernels as gpk
from gpkernels import backends, ops
from gpkernels.bench import machine
from gpkernels.bench.cases import CASES
from gpkernels.bench.small import SMALL
from gpkernels.critic import by_autograd, passes, program, run, step, work
from gpkernels.critic.curved import CurvedPasses
from gpkernels.critic.rules import images, normalisation
from gpkernels.ops.affine_gradients import affine_gradients_reference
from gpkernels.ops.mean_pool import mean_pool_backward_reference, mean_pool_reference
from gpkernels.ops.normalise_curvature import normalise_curvature_reference
from gpkernels.zoo import plain_loss

Call = Callable[[], Any]
NOTHING = "nothing"
LARGE = "residual LayerNorm, N 8"
CRITICS = {**SMALL, **CASES}
COLUMNS = ("part", "case", "on", "off")
SMALL_OPS = "interpolate 64 x 2", "gradient_norm_penalty 64 x 2"


def _no_direct() -> None:
    for op in ops.ALL.values():
        op.direct = op.recorded = backends.declined


def _no_deliver() -> None:
    _no_shelf()  # has a node of its own
    backends.deliver = backends.declined


def _no_loop() -> None:
    backends.program = None


def _no_records() -> None:
    step.record_of = lambda *args: None


def _no_shelf() -> None:
    run._native_path_is_off = lambda: True


def _no_native_by_autograd() -> None:
    run.shelf.by_autograd = lambda *args: None  # type: ignore[method-assign]


def _no_by_autograd() -> None:
    by_autograd.left_to_autograd.add = lambda *args: None  # type: ignore[method-assign]


def _no_programs() -> None:
    _no_shelf()
    program._traceable = lambda inputs: False


def _no_reuse() -> None:
    program.reusing = lambda calls, later, places: calls  # type: ignore[assignment]


def _always_joined() -> None:
    passes.COPIED = 1 << 62


def _no_curved() -> None:
    CurvedPasses.fits = staticmethod(lambda plan, wants: False)  # type: ignore[method-assign]


def _no_affine_gradients() -> None:
    normalisation.affine_gradients_op = affine_gradients_reference  # type: ignore[assignment]


def _no_normalise_curvature() -> None:
    normalisation.normalise_curvature_op = normalise_curvature_reference  # type: ignore[assignment]


def _no_mean_pool() -> None:
    images.mean_pool_op = mean_pool_reference  # type: ignore[assignment]
    images.mean_pool_backward_op = mean_pool_backward_reference  # type: ignore[assignment]


def _no_fused_ends() -> None:
    for name in ("score_loss_op", "score_loss_backward_op", "gradient_norm_penalty_op"):
        setattr(work, name, getattr(work, name).implementation)
    work.gradient_norm_penalty_backward_op = work.gradient_norm_penalty_backward_op.implementation


# How to switch a part off, and the cases to measure.
PARTS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "_direct": (_no_direct, SMALL_OPS),
    "settled": (_no_records, ("ReLU, N 2", "LayerNorm, N 64", "custom function, N 64")),
    "shelf": (_no_shelf, ("ReLU, N 2", "LayerNorm, N 64", "residual, N 2")),
    "deliver (and shelf)": (_no_deliver, ("ReLU, N 2", "LayerNorm, N 64", "residual, N 2")),
    "loop (and shelf)": (_no_loop, ("ReLU, N 2", "LayerNorm, N 64", "residual, N 2")),
    "programs (and shelf)": (_no_programs, ("ReLU, N 2", "LayerNorm, N 64", "residual, N 2")),
    "reuse": (_no_reuse, ("sine, N 64", "RMSNorm, N 2", LARGE)),
    "products apart": (_always_joined, ("MLP 2-128x3-1, N 256", "MLP 2-512x3-1, N 256")),
    "by_autograd": (_no_by_autograd, ("custom function, N 2",)),
    "by_autograd, native": (_no_native_by_autograd, ("custom function, N 2",)),
    "one batch": (lambda: None, ("ReLU, N 2", "LayerNorm, N 64", "residual, N 2")),
    "check": (lambda: None, ("ReLU, N 2", "LayerNorm, N 64", "residual, N 2")),
    "curved passes": (_no_curved, ("tanh, N 64", "LayerNorm, N 64", "SiLU, N 64")),
    "affine_gradients": (_no_affine_gradients, ("LayerNorm, N 64", "DCGAN GroupNorm, N 2", LARGE)),
    "normalise_curvature": (_no_normalise_curvature, ("LayerNorm, N 64", "DCGAN GroupNorm, N 2", LARGE)),
    "mean_pool": (_no_mean_pool, ("residual, N 2", LARGE)),
    "score_loss, gradient_norm_penalty": (_no_fused_ends, ("ReLU, N 2", "LayerNorm, N 64", "residual, N 2")),
}
TOGETHER = {"one batch": False, "check": True}  # CriticLoss's option that switches the part off


def calls(case: str, together: bool | None) -> tuple[Call, Call]:
    """Return (ours, eager) for a case."""
    torch.manual_seed(0)
    if case in SMALL_OPS:
        x, y, eps = torch.randn(64, 2), torch.randn(64, 2), torch.rand(64, 1)
        if case == SMALL_OPS[0]:
            return lambda: gpk.interpolate(x, y, eps), lambda: eps * x + (1 - eps) * y
        return lambda: gpk.gradient_norm_penalty(x), lambda: (x.norm(2, dim=1) - 1).square().mean()
    critic, shape = CRITICS[case].make(), CRITICS[case].shape
    real, fake, eps = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
    loss, weights = gpk.CriticLoss(critic, together=together), list(critic.parameters())
    return (
        lambda: torch.autograd.grad(loss(real, fake, eps=eps).loss, weights, allow_unused=True),
        lambda: torch.autograd.grad(plain_loss(critic, real, fake, eps), weights, allow_unused=True),
    )


def speedup(case: str, together: bool | None, rounds: int) -> float:
    """Return eager's time over ours: minimum CPU time, interleaved."""
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    pair, best = calls(case, together), [float("inf")] * 2
    for call in pair:
        for _ in range(6):
            call()
    for _ in range(min(rounds, 12) if case in CASES else rounds):
        for i, call in enumerate(pair):
            start = time.process_time()
            for _ in range(1 if case in CASES else 4):
                call()
            best[i] = min(best[i], time.process_time() - start)
    return best[1] / best[0]


def _in_child(part: str, case: str, rounds: int) -> float:
    if part != NOTHING:
        PARTS[part][0]()
    return speedup(case, TOGETHER.get(part), rounds)


@cache
def measured(part: str, case: str, rounds: int, processes: int) -> float:
    """Return the median speedup of some processes, with a part off, or everything on."""
    found = []
    for _ in range(processes):
        with multiprocessing.get_context("fork").Pool(1) as pool:  # what a child patches and caches ends with it
            found.append(pool.apply(_in_child, (part, case, rounds)))
    return median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this part (default: all)")
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="rounds per process (default: 60)")
    parser.add_argument("--processes", type=int, default=3, metavar="N", help="processes per figure (default: 3)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args()
    print("  ".join([f"{'part':<36}", f"{'case':<30}", "   on", "  off"]))
    rows = []
    for part in options.part or PARTS:
        for case in PARTS[part][1]:
            on, off = (measured(name, case, options.rounds, options.processes) for name in (NOTHING, part))
            rows.append((part, case, round(on, 2), round(off, 2)))
            print(f"{part:<36}  {case:<30}  {on:5.2f}  {off:5.2f}", flush=True)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
