"""The critic step of a run's critic, beside eager PyTorch's: time and gradients."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gpkernels
from gpkernels.bench.clock import time_in_turns
from gpkernels.bench.trial import EAGER, OURS
from gpkernels.zoo import plain_loss
from gptrainer.config import TrainConfig

SECONDS = 0.5  # of timing, for each of the two
COMPARED = {"wgan": ("wgan", "none"), "wgan-gp": ("wgan", "wgan-gp"), "r1": ("gan", "r1"), "r2": ("gan", "r2")}


@dataclass(frozen=True)
class Comparison:
    """Milliseconds: the least over the rounds, of CPU time in one thread on a CPU."""

    ours_ms: float
    plain_ms: float
    gradient_difference: float

    @property
    def speedup(self) -> float:
        """Time of the plain step over the time of ours."""
        return self.plain_ms / self.ours_ms


def compare(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor) -> Comparison | None:
    """Compare the critic's loss with its weight gradients, at penalty weight 10; None for other systems than COMPARED.

    real, fake: (N, *).
    """
    if config.algorithm not in COMPARED:
        return None
    objective, penalty = COMPARED[config.algorithm]
    eps = torch.rand(len(real), generator=torch.Generator().manual_seed(config.seed)).to(real)
    interpolates = {"eps": eps} if penalty == "wgan-gp" else {}
    critic = copy.deepcopy(critic)
    weights = list(critic.parameters())
    loss = gpkernels.CriticLoss(critic, objective=objective, penalty=penalty)

    def ours() -> tuple[Tensor, ...]:
        if penalty == "none":
            return torch.autograd.grad(gpkernels.wgan_critic_loss(critic(real), critic(fake)), weights)
        return torch.autograd.grad(loss(real, fake, **interpolates).loss, weights)

    def plain() -> tuple[Tensor, ...]:
        return torch.autograd.grad(plain_loss(critic, real, fake, eps, objective, penalty), weights)

    difference = relative_difference(ours(), plain())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = time_in_turns({OURS: ours, EAGER: plain}, real.device, SECONDS)
    finally:
        torch.set_num_threads(threads)
    return Comparison(times[OURS].cpu / 1e3, times[EAGER].cpu / 1e3, difference)


def relative_difference(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> float:
    """Largest |a - b| over the largest |b|, for elements a of ours and b of plain."""
    a, b = (torch.cat([grad.flatten() for grad in grads]) for grads in (ours, plain))
    return ((a - b).abs().max() / b.abs().max()).item()
