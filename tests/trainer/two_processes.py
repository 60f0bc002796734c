"""Trains every system that has no random numbers in its networks, in float64: in one process, or by torchrun."""

from __future__ import annotations

import sys

import pytest
import torch
from unmeasured import NoQuality

from gpkernels.arguments import UserError
from gptrainer import loop
from gptrainer.cli import parse
from gptrainer.loop import Trainer
from gptrainer.processes import Processes

SYSTEMS = ("gan", "gan-noise", "wgan", "wgan-gp", "r1", "r2", "r3gan", "unrolled")


def train(processes: Processes, system: str, out: str, *more: str) -> None:
    quick = ("--data", "8gaussians", "--width", "8", "--batch-size", "32", "--n-critic", "2")
    often = ("--log-every", "1", "--eval-every", "6", "--checkpoint-every", "3")
    config = parse([system, *quick, *often, "--out", out, *more])
    assert config is not None
    Trainer(config, processes).train()


def train_all(processes: Processes, out: str) -> None:
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "build_quality", lambda *_, **__: NoQuality())
            for system in SYSTEMS:
                train(processes, system, f"{out}/{system}", "--steps", "6")
            train(processes, "wgan-gp", f"{out}/halves", "--steps", "3")
            train(processes, "wgan-gp", f"{out}/halves", "--steps", "6", "--resume")
    finally:
        torch.set_default_dtype(default)
        torch.set_num_threads(threads)


def main(out: str) -> None:
    processes = Processes.join(torch.device("cpu"))
    train_all(processes, out)
    try:
        Trainer(parse(["gan", "--data", "8gaussians", "--batch-size", "33"]), processes)  # type: ignore[arg-type]
    except UserError as error:
        print(f"rank {processes.rank}: {error}")
    processes.leave()


if __name__ == "__main__":
    main(sys.argv[1])
