"""Runs of the trainer without files, and critics trained against a generator that stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptrainer.algorithms import Setup, System, build_system
from gptrainer.config import TrainConfig, filled
from gptrainer.data import DATASETS
from gptrainer.errors import UserError
from gptrainer.loop import Trainer
from gptrainer.processes import Draws, Processes
from gptrainer.reproduce.experiment import Context, NotRun


def fit(loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer, steps: int) -> None:
    """Steps down a loss that draws its own batch in each call."""
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def start(algorithm: str, data: str, steps: int, seed: int, context: Context, **values: Any) -> Trainer:
    """A run that has not begun; NotRun where its data is not on this machine."""
    try:
        where = context.data_dir if DATASETS[data].kind == "images" else None
        return Trainer(TrainConfig(algorithm, data, steps=steps, seed=seed, data_dir=where, **values).complete())
    except UserError as reason:
        raise NotRun(str(reason)) from None


def train(trainer: Trainer, every: int, look: Callable[[Trainer, dict[str, float]], None]) -> None:
    """All steps of a run. look: called after each ``every`` of them, with the means of the losses since."""
    steps = filled(trainer.config.steps)
    sums: dict[str, float] = {}
    while trainer.step < steps:
        for name, value in trainer.train_step().items():
            sums[name] = sums.get(name, 0.0) + value.item() / every
        if trainer.step % every == 0:
            look(trainer, sums)
            sums = {}


def system_of(algorithm: str, data: str, generator: nn.Module, critic: nn.Module, seed: int, **values: Any) -> System:
    """A system on networks of one's own: its ``critic_step`` is then called with any real and fake batch."""
    config = TrainConfig(algorithm, data, seed=seed, **values).complete()
    processes = Processes()
    draws = Draws(processes, seed, torch.device("cpu"))
    return build_system(Setup(config, generator, critic, processes, draws))
