"""Further programs for bench/programs.py, most of them examples, beside their formulas in plain PyTorch.

A step is the loss, its weight gradients and Adam. Plain PyTorch is written as these programs write it: the gradient is
taken of the scores that the loss uses too, where they do that. The gradients of both sides are compared first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpkernels as gpk
from gpkernels.zoo import mlp

Loss = Callable[[], Tensor]
EXAMPLES = Path(__file__).parents[1] / "examples"


class Program(NamedTuple):
    """model: to train. ours, plain: from a copy of the model to its loss, on the same data."""

    model: nn.Module
    ours: Callable[[nn.Module], Loss]
    plain: Callable[[nn.Module], Loss]


def example(name: str) -> dict[str, Any]:
    """Return what a file of examples defines."""
    return run_path(str(EXAMPLES / f"{name}.py"))


def of_critic(
    critic: nn.Module, plain: Callable[[nn.Module], Tensor], data: tuple[Any, ...], **options: Any
) -> Program:
    """Return a program whose loss is ``CriticLoss`` with these options. data: real, fake and further inputs."""
    real, fake, *further = data

    def ours(copied: nn.Module) -> Loss:
        loss = gpk.CriticLoss(copied, **options)
        return lambda: loss(real, fake, critic_args=further).loss

    return Program(critic, ours, lambda copied: lambda: plain(copied))


def squared_norm(scores: Tensor, x: Tensor) -> Tensor:
    """Mean of the squared norm of the scores' gradient, by double backward."""
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()


# --- programs ---------------------------------------------------------------------------------------------------------


def amp(n: int) -> Program:
    """AMP: least squares with targets of 1 and -1, R1 with a weight of 10 / 2, at normalised observations."""
    real, fake = torch.randn(n, 105), torch.randn(n, 105)

    def plain(critic: nn.Module) -> Tensor:
        expert = real.clone().requires_grad_()
        scores = critic(expert)
        loss = (scores - 1).square().mean() + (critic(fake) + 1).square().mean()
        return loss + 5 * squared_norm(scores, expert)

    options = {"objective": "least-squares", "real_target": 1, "fake_target": -1, "penalty": "r1", "penalty_weight": 5}
    return of_critic(mlp(105, 1024, 512, 1), plain, (real, fake), **options)


def force_field(n: int) -> Program:
    """Energies and forces of clusters of seven atoms, by the model of the example."""
    named = example("force_field")
    atoms = named["ATOMS"]
    positions = 2 * torch.rand(n, atoms, 3)
    energies, forces = torch.randn(n), torch.randn(n, atoms, 3)

    def loss(energy: Tensor, gradient: Tensor) -> Tensor:
        return (energy - energies).square().mean() + (-gradient - forces).square().mean()

    def ours(model: nn.Module) -> Loss:
        return lambda: loss(*gpk.value_and_input_gradient(model, positions))

    def plain(model: nn.Module) -> Loss:
        def called() -> Tensor:
            x = positions.clone().requires_grad_()
            energy = model(x)
            (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            return loss(energy, gradient)

        return called

    return Program(named["EnergyModel"](atoms), ours, plain)


class StableBlock(nn.Module):
    """Residual block with activations in front and a tenth of the residual."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        middle = min(before, after)
        self.conv1, self.conv2 = nn.Conv2d(before, middle, 3, padding=1), nn.Conv2d(middle, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        return self.shortcut(x) + 0.1 * h


class StableCritic(nn.Module):
    """Residual critic of as many logits as classes, of which the label picks one."""

    def __init__(self, channels: int = 16, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), StableBlock(channels, channels)]
        widths = [channels * 2**i for i in range(int(math.log2(size)) - 1)]
        for before, after in pairwise(widths):
            layers += [nn.AvgPool2d(3, 2, 1), StableBlock(before, after)]
        self.body = nn.Sequential(*layers)
        self.top = nn.Linear(widths[-1] * 16, classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.top(F.leaky_relu(self.body(x).flatten(1), 0.2))
        return logits[torch.arange(len(x)), labels]


def stable(n: int) -> Program:
    """GAN_stability: cross-entropy of logits, R1 with a weight of 10."""
    real, fake, labels = torch.randn(n, 3, 32, 32), torch.randn(n, 3, 32, 32), torch.randint(10, (n,))

    def plain(critic: nn.Module) -> Tensor:
        x = real.clone().requires_grad_()
        scores = critic(x, labels)
        loss = F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores)) + 10 * squared_norm(scores, x)
        scores = critic(fake, labels)
        return loss + F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))

    options = {"objective": "gan", "penalty": "r1", "penalty_weight": 10}
    return of_critic(StableCritic(), plain, (real, fake, labels), **options)


def stylegan2(n: int) -> Program:
    """StyleGAN2's critic, conditional, with R1 and R2 in every step: gamma / 2 = 0.5 each."""
    real, fake, labels = torch.randn(n, 3, 32, 32), torch.randn(n, 3, 32, 32), torch.randint(10, (n,))

    def plain(critic: nn.Module) -> Tensor:
        x, y = real.clone().requires_grad_(), fake.clone().requires_grad_()
        real_scores, fake_scores = critic(x, labels), critic(y, labels)
        adversarial = F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()
        return adversarial + 0.5 * squared_norm(real_scores, x) + 0.5 * squared_norm(fake_scores, y)

    critic = example("conditional_r1")["Critic"](channels=32, size=32, colours=3)
    return of_critic(critic, plain, (real, fake, labels), objective="gan", penalty={"r1": 0.5, "r2": 0.5})


def language(n: int) -> Program:
    """WGAN-GP's critic of lines of 32 characters, with its weight of 10."""
    named = example("language")
    characters = len(named["ALPHABET"])
    real = F.one_hot(torch.randint(characters, (n, 32)), characters).float()
    fake = torch.randn(n, 32, characters).softmax(-1)

    def plain(critic: nn.Module) -> Tensor:
        loss = critic(fake).mean() - critic(real).mean()
        eps = torch.rand(n, 1, 1)
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return loss + 10 * (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()

    return of_critic(named["Critic"](64, length=32, blocks=5), plain, (real, fake))


MODELS: dict[str, Callable[[], Program]] = {
    "AMP, N 4096": lambda: amp(4096),
    "AMP, N 512": lambda: amp(512),
    "force field, N 64": lambda: force_field(64),
    "force field, N 4": lambda: force_field(4),
    "GAN_stability R1, N 16": lambda: stable(16),
    "StyleGAN2 R1 + R2, N 16": lambda: stylegan2(16),
    "language, N 64": lambda: language(64),
}


# --- steps ------------------------------------------------------------------------------------------------------------


def step_of(model: nn.Module, loss: Loss) -> Callable[[], Tensor]:
    """Return a training step of the model, which gives its loss."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def compare(name: str, program: Program) -> None:
    """Raise unless both losses have the same weight gradients, in calls one by one and as one batch."""
    weights = list(program.model.parameters())
    ours, plain = program.ours(program.model), program.plain(program.model)
    for call in range(4):
        found = []
        for loss in (ours, plain):
            torch.manual_seed(call)  # of eps
            found.append(torch.autograd.grad(loss(), weights))
        scale = max(gradient.abs().max().item() for gradient in found[1])
        error = max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) / scale
        if not error < 1e-4:
            raise RuntimeError(f"{name}: gradients differ by {error:.1e} of the largest")


def steps(name: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return our step and the plain one, of copies of one model."""
    program = MODELS[name]()
    compare(name, program)
    ours, plain = copy.deepcopy(program.model), copy.deepcopy(program.model)
    return step_of(ours, program.ours(ours)), step_of(plain, program.plain(plain))


PROGRAMS = {name: partial(steps, name) for name in MODELS}
