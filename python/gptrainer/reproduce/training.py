"""Training without files, and critics trained against a fixed generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.arguments import UserError
from gptrainer.algorithms import System, build_system
from gptrainer.data import DATASETS
from gptrainer.data.points import Draw
from gptrainer.loop import Trainer
from gptrainer.models import sample
from gptrainer.processes import Draws, Processes
from gptrainer.reproduce.experiment import Context, NotRun
from gptrainer.systems import configure


def fit(loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer, steps: int) -> None:
    """Minimise a loss that draws its own batch in each call."""
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def start(algorithm: str, data: str, steps: int, seed: int, context: Context, **values: Any) -> Trainer:
    """Set up a run; NotRun where its data is not on this machine."""
    try:
        where = context.data_dir if DATASETS[data].kind == "images" else None
        return Trainer(configure(algorithm, data, steps=steps, seed=seed, data_dir=where, **values))
    except UserError as reason:
        raise NotRun(str(reason)) from None


def train(trainer: Trainer, every: int, look: Callable[[Trainer, dict[str, float]], None]) -> None:
    """Train to the last step. look: called after every ``every`` steps, with the mean losses since."""
    steps = trainer.config.steps
    sums: dict[str, float] = {}
    while trainer.step < steps:
        for name, value in trainer.train_step().items():
            sums[name] = sums.get(name, 0.0) + value.item() / every
        if trainer.step % every == 0:
            look(trainer, sums)
            sums = {}


def system_of(algorithm: str, data: str, generator: nn.Module, critic: nn.Module, seed: int, **values: Any) -> System:
    """Build a system on given networks, to call its ``critic_step`` with any real and generated batch."""
    draws = Draws(Processes(), seed, torch.device("cpu"))
    config = configure(algorithm, data, seed=seed, **values)
    return build_system(config, generator, critic, draws)


def play(
    system: System,
    draw: Draw,
    steps: int,
    random: torch.Generator,
    every: int,
    look: Callable[[int], None],
    critic_steps: int = 1,
) -> None:
    """Train both networks of a system on samples of ``draw``. look: called after every ``every`` steps."""
    size, latent = system.config.batch_size, system.config.latent
    for step in range(steps):
        system.begin_step(step)
        for _ in range(critic_steps):
            real = draw(size, random)
            system.critic_step(real, sample(system.generator, torch.randn(size, latent, generator=random)))
        system.generator_step(torch.randn(size, latent, generator=random), real)
        if (step + 1) % every == 0:
            look(step + 1)
