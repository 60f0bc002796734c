"""A run's critic step beside the usual one in plain PyTorch: time and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gpkernels
from gpkernels.bench.clock import Call, time_in_turns
from gpkernels.bench.zoo import plain_loss, plain_penalty, plain_points
from gptrainer.config import TrainConfig
from gptrainer.systems import R1Config, WGANConfig, WGANGPConfig

SECONDS = 0.5  # of timing, for each of the two
COMPARED = ("wgan", "wgan-gp", "r1", "r2")
CLIPPING = "loss, gradients, RMSprop and clipping"
PENALISED = "loss with gradient penalty, and gradients"


@dataclass(frozen=True)
class Comparison:
    """what: the step that was timed. Milliseconds: the least over the rounds, of CPU time in one thread on a CPU."""

    what: str
    ours_ms: float
    plain_ms: float
    gradient_difference: float

    @property
    def speedup(self) -> float:
        """Time of the plain step over the time of ours."""
        return self.plain_ms / self.ours_ms


def compare(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor) -> Comparison | None:
    """Compare both steps on copies of a critic; None for a system that has no counterpart in plain PyTorch here.

    real, fake: (N, *).
    """
    if config.algorithm not in COMPARED:
        return None
    eps = torch.rand(len(real), generator=torch.Generator().manual_seed(config.seed)).to(real)
    ours, plain = copy.deepcopy(critic), copy.deepcopy(critic)
    loss, update = critic_loss(config, ours), lambda: None
    plain_update: Call = update
    if isinstance(config, WGANConfig):
        update = gpkernels.optim.RMSprop(ours.parameters(), lr=config.lr, clip=config.clip).step
        plain_update = clipping(torch.optim.RMSprop(plain.parameters(), lr=config.lr), config.clip)
    steps = {
        "ours": _step(ours, lambda: loss(real, fake, eps), update),
        "plain": _step(plain, lambda: plain_critic_loss(config, plain, real, fake, eps), plain_update),
    }
    for step in steps.values():
        step()
    difference = gradient_difference(ours, plain)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = time_in_turns(steps, real.device, SECONDS)
    finally:
        torch.set_num_threads(threads)
    what = CLIPPING if isinstance(config, WGANConfig) else PENALISED
    return Comparison(what, times["ours"].cpu / 1e3, times["plain"].cpu / 1e3, difference)


def critic_loss(config: TrainConfig, critic: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of (real, fake, eps) by gpkernels."""
    if isinstance(config, WGANGPConfig):
        gp = gpkernels.CriticLoss(critic, penalty_weight=config.penalty_weight, one_sided=config.one_sided)
        return lambda real, fake, eps: gp(real, fake, eps=eps).loss
    if isinstance(config, R1Config):
        game, penalty, weight = "gan", config.algorithm, config.gamma / 2
    else:
        game, penalty, weight = "wgan", "none", 0.0
    loss = gpkernels.CriticLoss(critic, objective=game, penalty=penalty, penalty_weight=weight)
    return lambda real, fake, eps: loss(real, fake).loss


def plain_critic_loss(config: TrainConfig, critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """The same loss as it is usually written."""
    game = "gan" if isinstance(config, R1Config) else "wgan"
    loss = plain_loss(critic, real, fake, eps, game, "none")
    if isinstance(config, WGANGPConfig):
        points = plain_points(real, fake, eps, "wgan-gp")
        return loss + config.penalty_weight * plain_penalty(critic, points, one_sided=config.one_sided)
    if isinstance(config, R1Config):
        points = plain_points(real, fake, eps, config.algorithm)
        return loss + config.gamma / 2 * plain_penalty(critic, points, target=0.0)
    return loss


def clipping(optimiser: torch.optim.Optimizer, bound: float) -> Call:
    """An optimiser's step followed by a clamp of each weight."""

    @torch.no_grad()
    def step() -> None:
        optimiser.step()
        for group in optimiser.param_groups:
            for weight in group["params"]:
                weight.clamp_(-bound, bound)

    return step


def gradient_difference(ours: nn.Module, plain: nn.Module) -> float:
    """Largest |a - b| over the largest |b|, for the weight gradients a and b of two copies of a network."""
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (ours, plain))
    return ((a - b).abs().max() / b.abs().max()).item()


def _step(critic: nn.Module, loss: Callable[[], Tensor], update: Call) -> Call:
    def step() -> None:
        critic.zero_grad()
        loss().backward()
        update()

    return step
