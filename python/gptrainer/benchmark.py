"""Whole training iterations: the trainer's own beside a straightforward PyTorch trainer of the same networks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.bench.clock import Call
from gpkernels.bench.counts import bare_products
from gpkernels.bench.trial import EAGER, OURS, Trial
from gpkernels.zoo import plain_loss
from gptrainer import parts
from gptrainer.config import TrainConfig, filled
from gptrainer.loop import Trainer
from gptrainer.processes import Processes

SUITE = "train"
CASES: dict[str, dict[str, Any]] = {
    "wgan-gp, 8 Gaussians, MLP 128": {"algorithm": "wgan-gp", "data": "8gaussians"},
    "wgan-gp, digits": {"algorithm": "wgan-gp", "data": "digits"},
    "wgan, 8 Gaussians, MLP 128": {"algorithm": "wgan", "data": "8gaussians"},
}


def trials(device: torch.device, quick: bool) -> Iterator[Trial]:
    """Five critic steps and one of the generator, with data, noise and optimisers."""
    for case, options in CASES.items():
        if not quick or case == next(iter(CASES)):
            yield trial(case, device, options)


def growth(device: torch.device) -> Iterator[Trial]:
    """An iteration on points as batch and width grow."""
    base = CASES["wgan-gp, 8 Gaussians, MLP 128"]
    for option, sizes in (("batch_size", (16, 64, 256, 1024, 2560)), ("width", (32, 128, 512, 1280))):
        axis = f"wgan-gp on 8 Gaussians: {option.replace('_', ' ')}"
        for size in sizes:
            yield trial(f"{axis} {size}", device, {**base, option: size}, axis=axis, size=size)


def trial(case: str, device: torch.device, options: dict[str, Any], **place: Any) -> Trial:
    """Both trainers from the same weights. The limit is what the trainer's iteration has of products."""
    folder = tempfile.TemporaryDirectory(prefix="gpkernels-bench-")
    config = TrainConfig(**options, device=device.type, out=Path(folder.name)).complete()
    trainer = Trainer(config)
    plain = PlainTrainer(config, *(copy.deepcopy(trainer.networks[name]) for name in ("generator", "critic")))

    calls: dict[str, Callable[[], Call]] = {OURS: lambda: _held(trainer.train_step, folder), EAGER: lambda: plain.step}
    return Trial(SUITE, case, calls, lambda: bare_products(trainer.train_step), **place)


def _held(call: Call, folder: object) -> Call:
    """The call, and with it the folder that its trainer writes to."""
    return lambda: (folder, call())


class PlainTrainer:
    """WGAN and WGAN-GP as tutorials have them: PyTorch's optimisers with their defaults, a generator pass for each
    critic step, a double backward for the penalty."""

    def __init__(self, config: TrainConfig, generator: nn.Module, critic: nn.Module) -> None:
        self.config, self.generator, self.critic = config, generator, critic
        self.device = torch.device(config.device)
        self.batches = parts.batches(config, Processes(), self.device)
        make: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop
        options: dict[str, Any] = {"lr": filled(config.lr)}
        if config.algorithm == "wgan-gp":
            make, options["betas"] = torch.optim.Adam, filled(config.betas)
        self.critic_optimiser = make(critic.parameters(), **options)
        self.generator_optimiser = make(generator.parameters(), **options)

    def step(self) -> None:
        """One iteration."""
        for _ in range(filled(self.config.n_critic)):
            real = self.batches.next()
            with torch.no_grad():
                fake = self.generator(self.noise())
            loss = self.critic_loss(real, fake)
            self.critic_optimiser.zero_grad()
            loss.backward()
            self.critic_optimiser.step()
            if self.config.algorithm == "wgan":
                clip = filled(self.config.clip)
                with torch.no_grad():
                    for p in self.critic.parameters():
                        p.clamp_(-clip, clip)
        loss = -self.critic(self.generator(self.noise())).mean()
        self.generator_optimiser.zero_grad()
        loss.backward()
        self.generator_optimiser.step()

    def noise(self) -> Tensor:
        """(N, latent)."""
        return torch.randn(filled(self.config.batch_size), filled(self.config.latent), device=self.device)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """WGAN's, with the penalty (Gulrajani et al. 2017, eq. 3) where there is one."""
        eps = torch.rand(len(real), device=self.device)
        if self.config.algorithm == "wgan":
            return plain_loss(self.critic, real, fake, eps, penalty="none")
        return plain_loss(self.critic, real, fake, eps, weight=filled(self.config.penalty_weight))
