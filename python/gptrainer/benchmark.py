"""Whole training iterations: the trainer's own beside plain PyTorch's on the same networks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
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
    folder = tempfile.TemporaryDirectory(prefix="gpkernels-bench-")
    config = configure(**options, device=device.type, out=Path(folder.name))
    trainer = Trainer(config)
    plain = PlainTrainer(config, copy.deepcopy(trainer.generator), copy.deepcopy(trainer.critic))

    def ours() -> object:
        return folder, trainer.train_step()  # the folder lives as long as the call

    calls: dict[str, Callable[[], Call]] = {OURS: lambda: ours, EAGER: lambda: plain.step}
    return Trial(SUITE, case, calls, lambda: bare_products(trainer.train_step), **place)


class PlainTrainer:
    """WGAN and WGAN-GP as in tutorials: PyTorch's optimisers with their defaults, a generator pass for each critic
    step, a double backward for the penalty."""

    def __init__(self, config: TrainConfig, generator: nn.Module, critic: nn.Module) -> None:
        self.config, self.generator, self.critic = config, generator, critic
        self.device = torch.device(config.device)
        self.batches = load_batches(config.data, config.batch_size, config.seed, self.device)
        make: Callable[..., torch.optim.Optimizer] = partial(torch.optim.RMSprop, lr=config.lr)
        if isinstance(config, AdamConfig):
            make = partial(torch.optim.Adam, lr=config.lr, betas=config.betas)
        self.critic_optimiser, self.generator_optimiser = (make(net.parameters()) for net in (critic, generator))

    def step(self) -> None:
        """Take one iteration."""
        for _ in range(self.config.n_critic):
            real = self.batches.next()
            with torch.no_grad():
                fake = self.generator(self.noise())
            eps = torch.rand(len(real), device=self.device)
            weight = getattr(self.config, "penalty_weight", 0.0)
            loss = plain_loss(self.critic, real, fake, eps, "wgan", "wgan-gp" if weight else "none", weight)
            self.critic_optimiser.zero_grad()
            loss.backward()
            self.critic_optimiser.step()
            if isinstance(self.config, WGANConfig):
                with torch.no_grad():
                    for weights in self.critic.parameters():
                        weights.clamp_(-self.config.clip, self.config.clip)
        loss = -self.critic(self.generator(self.noise())).mean()
        self.generator_optimiser.zero_grad()
        loss.backward()
        self.generator_optimiser.step()

    def noise(self) -> Tensor:
        """Draw latent points, (N, latent)."""
        return torch.randn(self.config.batch_size, self.config.latent, device=self.device)
