"""Our critic step beside the usual plain PyTorch one: time and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gpkernels
from gpkernels.bench.clock import time_in_turns
from gptrainer.config import TrainConfig, filled

Step = Callable[[], None]
SECONDS = 0.5  # of each way's rounds


@dataclass(frozen=True)
class Comparison:
    """what: the step that was taken. Milliseconds: the least of the rounds, of CPU time in one thread on a CPU."""

    what: str
    ours_ms: float
    plain_ms: float
    gradient_difference: float

    @property
    def speedup(self) -> float:
        """How many of our steps fit into a plain one."""
        return self.plain_ms / self.ours_ms


def compare(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor) -> Comparison | None:
    """Both steps on copies of a critic, or None for a system in which gpkernels has nothing to gain, or whose critic
    draws random numbers. real, fake: (N, *). Time is taken in turns, so that both meet the same load."""
    steps = STEPS.get(config.algorithm)
    if steps is None:
        return None
    what, ours_of, plain_of = steps
    eps = torch.rand(len(real), generator=torch.Generator().manual_seed(config.seed)).to(real)
    our_critic, plain_critic = copy.deepcopy(critic), copy.deepcopy(critic)
    ours, plain = ours_of(config, our_critic, real, fake, eps), plain_of(config, plain_critic, real, fake, eps)
    ours()
    plain()
    difference = gradient_difference(our_critic, plain_critic)
    with one_thread():
        times = time_in_turns({"ours": ours, "plain": plain}, real.device, SECONDS)
    return Comparison(what, times["ours"].cpu / 1e3, times["plain"].cpu / 1e3, difference)


def wgan_gp_step(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Step:
    """WGAN-GP's critic loss and its gradients, by gpkernels."""
    weight = filled(config.penalty_weight)
    criterion = gpkernels.CriticLoss(critic, penalty_weight=weight, one_sided=config.one_sided)

    def step() -> None:
        critic.zero_grad()
        criterion(real, fake, eps=eps).loss.backward()

    return step


def plain_wgan_gp_step(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Step:
    """The same as it is usually written."""

    def step() -> None:
        critic.zero_grad()
        weight = eps.view(-1, *[1] * (real.dim() - 1))
        excess = plain_gradient_norm(critic, weight * real + (1 - weight) * fake) - 1
        penalty = (excess.clamp(min=0) if config.one_sided else excess).square().mean()
        loss = critic(fake).mean() - critic(real).mean() + filled(config.penalty_weight) * penalty
        loss.backward()

    return step


def zero_centred_step(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor, _: Tensor) -> Step:
    """The critic loss of R1 or R2 and its gradients, by gpkernels."""
    weight = filled(config.gamma) / 2
    criterion = gpkernels.CriticLoss(critic, objective="gan", penalty=config.algorithm, penalty_weight=weight)

    def step() -> None:
        critic.zero_grad()
        criterion(real, fake).loss.backward()

    return step


def plain_zero_centred_step(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor, _: Tensor) -> Step:
    """The same as it is usually written."""
    points = real if config.algorithm == "r1" else fake

    def step() -> None:
        critic.zero_grad()
        penalty = filled(config.gamma) / 2 * plain_gradient_norm(critic, points).square().mean()
        softplus = nn.functional.softplus
        loss = softplus(-critic(real)).mean() + softplus(critic(fake)).mean() + penalty
        loss.backward()

    return step


def plain_gradient_norm(critic: nn.Module, points: Tensor) -> Tensor:
    """|grad D| at points, (N,), with a graph."""
    points = points.detach().requires_grad_()
    scores = critic(points)
    (grad,) = torch.autograd.grad(scores, points, torch.ones_like(scores), create_graph=True)
    return grad.flatten(1).norm(2, dim=1)


def wgan_step(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor, _: Tensor) -> Step:
    """WGAN's critic step by gpkernels, clipping in the optimiser's pass."""
    optimiser = gpkernels.optim.RMSprop(critic.parameters(), lr=filled(config.lr), clip=config.clip)

    def step() -> None:
        critic.zero_grad()
        gpkernels.wgan_critic_loss(critic(real), critic(fake)).backward()
        optimiser.step()

    return step


def plain_wgan_step(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor, _: Tensor) -> Step:
    """The same as it is usually written."""
    optimiser = torch.optim.RMSprop(critic.parameters(), lr=filled(config.lr))
    clip = filled(config.clip)

    def step() -> None:
        critic.zero_grad()
        (critic(fake).mean() - critic(real).mean()).backward()
        optimiser.step()
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.clamp_(-clip, clip)

    return step


MakeStep = Callable[[TrainConfig, nn.Module, Tensor, Tensor, Tensor], Step]
PENALISED = "loss with gradient penalty, and gradients"
STEPS: dict[str, tuple[str, MakeStep, MakeStep]] = {
    "wgan": ("loss, gradients, RMSprop and clipping", wgan_step, plain_wgan_step),
    "wgan-gp": (PENALISED, wgan_gp_step, plain_wgan_gp_step),
    "r1": (PENALISED, zero_centred_step, plain_zero_centred_step),
    "r2": (PENALISED, zero_centred_step, plain_zero_centred_step),
}


def gradient_difference(ours: nn.Module, plain: nn.Module) -> float:
    """Largest |a - b| over the largest |b|, a and b being the weights' gradients of two copies of a network."""
    a, b = (torch.cat([filled(p.grad).flatten() for p in m.parameters()]) for m in (ours, plain))
    return ((a - b).abs().max() / b.abs().max()).item()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread in torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
