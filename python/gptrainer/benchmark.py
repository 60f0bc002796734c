"""Whole training iterations: the trainer's own beside plain PyTorch's on the same networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.bench.clock import Call
from gpkernels.bench.counts import bare_products
from gpkernels.bench.trial import EAGER, OURS, Trial
from gpkernels.zoo import plain_loss
from gptrainer.config import TrainConfig
from gptrainer.data import load_batches
from gptrainer.loop import Trainer
from gptrainer.systems import AdamConfig, WGANConfig, configure

SUITE = "train"
CASES: dict[str, dict[str, Any]] = {
    "wgan-gp, 8 Gaussians, MLP 128": {"algorithm": "wgan-gp", "data": "8gaussians"},
    "wgan-gp, digits": {"algorithm": "wgan-gp", "data": "digits"},
    "wgan, 8 Gaussians, MLP 128": {"algorithm": "wgan", "data": "8gaussians"},
}


def trials(device: torch.device, quick: bool) -> Iterator[Trial]:
    """Yield iterations of five critic steps and a generator step, with data, noise and optimisers."""
    for case, options in CASES.items():
        if not quick or case == next(iter(CASES)):
            yield trial(case, device, options)


def growth(device: torch.device) -> Iterator[Trial]:
    """Yield an iteration on points as batch and width grow."""
    base = CASES["wgan-gp, 8 Gaussians, MLP 128"]
    for option, sizes in (("batch_size", (16, 64, 256, 1024, 2560)), ("width", (32, 128, 512, 1280))):
        axis = f"wgan-gp on 8 Gaussians: {option.replace('_', ' ')}"
        for size in sizes:
            yield trial(f"{axis} {size}", device, {**base, option: size}, axis=axis, size=size)


def trial(case: str, device: torch.device, options: dict[str, Any], **place: Any) -> Trial:
    """Make both trainers, from the same weights. The limit is the products of the trainer's iteration."""
    config = configure(**options, device=device.type)
    trainer = Trainer(config)  # which writes nothing until it saves
    plain = plain_iteration(config, copy.deepcopy(trainer.generator), copy.deepcopy(trainer.critic))
    calls: dict[str, Callable[[], Call]] = {OURS: lambda: trainer.train_step, EAGER: lambda: plain}
    return Trial(SUITE, case, calls, lambda: bare_products(trainer.train_step), **place)


def plain_iteration(config: TrainConfig, generator: nn.Module, critic: nn.Module) -> Callable[[], None]:
    """Make an iteration of WGAN or WGAN-GP as in tutorials.

    It has PyTorch's optimisers with their defaults, a generator pass for each critic step, and a double backward for
    the penalty.
    """
    device, weight = torch.device(config.device), getattr(config, "penalty_weight", 0.0)
    batches = load_batches(config.data, config.batch_size, config.seed, device)
    make: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop
    if isinstance(config, AdamConfig):
        make = partial(torch.optim.Adam, betas=config.betas)
    critic_optimiser, generator_optimiser = (make(net.parameters(), lr=config.lr) for net in (critic, generator))

    def generated() -> Tensor:
        return generator(torch.randn(config.batch_size, config.latent, device=device))

    def iteration() -> None:
        for _ in range(config.n_critic):
            real = batches.next()
            with torch.no_grad():
                fake = generated()
            eps = torch.rand(len(real), device=device)
            loss = plain_loss(critic, real, fake, eps, "wgan", "wgan-gp" if weight else "none", weight)
            critic_optimiser.zero_grad()
            loss.backward()
            critic_optimiser.step()
            if isinstance(config, WGANConfig):
                with torch.no_grad():
                    for weights in critic.parameters():
                        weights.clamp_(-config.clip, config.clip)
        loss = -critic(generated()).mean()
        generator_optimiser.zero_grad()
        loss.backward()
        generator_optimiser.step()

    return iteration
