"""Our critic step beside the usual plain PyTorch one: time and gradients."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gpkernels
from gptrainer.config import TrainConfig, filled

Step = Callable[[], None]
ROUNDS = 40
STEPS_A_ROUND = 3


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


def compare(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor) -> Comparison:
    """Both steps on copies of a critic. real, fake: (N, *). Time is taken in turns, so that both meet the same load."""
    eps = torch.rand(len(real), generator=torch.Generator().manual_seed(config.seed)).to(real)
    our_critic, plain_critic = copy.deepcopy(critic), copy.deepcopy(critic)
    if config.algorithm == "wgan":
        what = "loss, gradients, RMSprop and clipping"
        ours = wgan_step(our_critic, real, fake, filled(config.lr), config.clip)
        plain = plain_wgan_step(plain_critic, real, fake, filled(config.lr), config.clip)
    else:
        what = "loss with gradient penalty, and gradients"
        ours = wgan_gp_step(our_critic, real, fake, eps, filled(config.penalty_weight))
        plain = plain_wgan_gp_step(plain_critic, real, fake, eps, filled(config.penalty_weight))
    ours()
    plain()
    difference = gradient_difference(our_critic, plain_critic)
    with one_thread():
        ours_ms, plain_ms = time_in_turns((ours, plain), real.device)
    return Comparison(what, ours_ms, plain_ms, difference)


def wgan_gp_step(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor, penalty_weight: float) -> Step:
    """WGAN-GP's critic loss and its gradients, by gpkernels."""
    criterion = gpkernels.CriticLoss(critic, penalty="wgan-gp", penalty_weight=penalty_weight)

    def step() -> None:
        critic.zero_grad()
        criterion(real, fake, eps=eps).loss.backward()

    return step


def plain_wgan_gp_step(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor, penalty_weight: float) -> Step:
    """The same as it is usually written."""

    def step() -> None:
        critic.zero_grad()
        weight = eps.view(-1, *[1] * (real.dim() - 1))
        interpolates = (weight * real + (1 - weight) * fake).requires_grad_()
        scores = critic(interpolates)
        (grad,) = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)
        penalty = ((grad.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
        loss = critic(fake).mean() - critic(real).mean() + penalty_weight * penalty
        loss.backward()

    return step


def wgan_step(critic: nn.Module, real: Tensor, fake: Tensor, lr: float, clip: float) -> Step:
    """WGAN's critic step by gpkernels, clipping in the optimiser's pass."""
    optimiser = gpkernels.optim.RMSprop(critic.parameters(), lr=lr, clip=clip)

    def step() -> None:
        critic.zero_grad()
        gpkernels.wgan_critic_loss(critic(real), critic(fake)).backward()
        optimiser.step()

    return step


def plain_wgan_step(critic: nn.Module, real: Tensor, fake: Tensor, lr: float, clip: float) -> Step:
    """The same as it is usually written."""
    optimiser = torch.optim.RMSprop(critic.parameters(), lr=lr)

    def step() -> None:
        critic.zero_grad()
        (critic(fake).mean() - critic(real).mean()).backward()
        optimiser.step()
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.clamp_(-clip, clip)

    return step


def gradient_difference(ours: nn.Module, plain: nn.Module) -> float:
    """Largest |a - b| over the largest |b|, a and b being the weights' gradients of two copies of a network."""
    a, b = (torch.cat([filled(p.grad).flatten() for p in m.parameters()]) for m in (ours, plain))
    return ((a - b).abs().max() / b.abs().max()).item()


def time_in_turns(steps: tuple[Step, ...], device: torch.device) -> list[float]:
    """Milliseconds a step: the least over the rounds."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for step, taken in zip(steps, times, strict=True):
            start = _clock(device)
            for _ in range(STEPS_A_ROUND):
                step()
            taken.append((_clock(device) - start) * 1e3 / STEPS_A_ROUND)
    return [min(taken) for taken in times]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread in torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time()  # CPU time does not count what other processes take
    torch.accelerator.synchronize()
    return time.perf_counter()
