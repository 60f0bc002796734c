"""Suite of penalties and critic steps with weight gradients, against PyTorch eager and compiled, JAX, bare products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import gpkernels as gpk
from gpkernels.bench import jax_step
from gpkernels.bench.cases import CASES, Case, in_scale
from gpkernels.bench.clock import Call
from gpkernels.bench.counts import bare_products
from gpkernels.bench.small import SMALL
from gpkernels.bench.trial import AS_PROGRAM, BY_INDUCTOR, EAGER, OURS, Trial
from gpkernels.zoo import dcgan, first, mlp, plain_loss, plain_penalty, plain_points

SUITE = "steps"
QUICK = ("MLP 2-64x3-1, N 64", "DCGAN 32 px, N 64")
BASE_WIDTH, BASE_DEPTH, BASE_BATCH, BASE_SIZE = 128, 3, 256, 32


@dataclass(frozen=True)
class Step:
    """A critic with a batch. real, fake: (N, *). eps: (N,)."""

    critic: nn.Module
    real: Tensor
    fake: Tensor
    eps: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Step:
        torch.manual_seed(0)
        critic = case.make().to(device)
        real, fake = (torch.randn(case.shape, device=device) for _ in range(2))
        return cls(critic, real, fake, torch.rand(case.shape[0], device=device))

    @property
    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.critic.parameters() if p.requires_grad]

    def gradients(self, loss: Callable[[], Tensor]) -> Call:
        weights = self.weights
        return lambda: torch.autograd.grad(loss(), weights, allow_unused=True)

    def ours(self, loss: Callable[[], Tensor]) -> dict[str, Callable[[], Call]]:
        """Return a loss of ours, eager and compiled by Inductor and by the backend of this library."""
        return {
            OURS: lambda: self.gradients(loss),
            BY_INDUCTOR: lambda: self.gradients(torch.compile(lambda: loss())),
            AS_PROGRAM: lambda: self.gradients(torch.compile(lambda: loss(), backend=OURS)),
        }

    def compiled(self, loss: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Call:
        """Return torch.compile of torch.func.grad, as it rejects double backward. loss: of the critic as a function."""
        critic, weights = self.critic, {name: p.detach() for name, p in self.critic.named_parameters()}

        def of_weights(weights: dict[str, Tensor]) -> Tensor:
            return loss(lambda x: first(functional_call(critic, weights, (x,))))

        call = torch.compile(torch.func.grad(of_weights))
        return lambda: call(weights)


def trials(device: torch.device, quick: bool) -> Iterator[Trial]:
    """Yield every critic, small ones first: penalty, WGAN-GP step unless it is a field, and R1 with its loss."""
    for name, case in {**SMALL, **CASES}.items():
        if not quick or name in QUICK:
            yield from _of(name, Step.of(case, device), case.field)
    if not quick:
        name = "DCGAN 32 px, N 64"
        yield r1_trial(f"{name}, R1 step", Step.of(CASES[name], device))


def own_trials(critic: nn.Module, shape: tuple[int, ...], name: str, device: torch.device) -> Iterator[Trial]:
    """Yield the same for a user's critic."""
    yield from _of(f"{name}, {'x'.join(map(str, shape))}", Step.of(Case(lambda: critic, shape), device), False)


def growth(device: torch.device) -> Iterator[Trial]:
    """Yield a WGAN-GP step over batch, width, depth and image size, up to ten times the zoo's."""

    def mlp_of(width: int, depth: int, batch: int) -> Case:
        return Case(lambda: in_scale(mlp(2, *[width] * depth, 1)), (batch, 2))

    def dcgan_of(size: int, batch: int) -> Case:
        return Case(lambda: dcgan(3, 64, size), (batch, 3, size, size))

    curves: dict[str, list[tuple[int, Case]]] = {
        f"MLP 2-{BASE_WIDTH}x{BASE_DEPTH}-1: batch": [
            (n, mlp_of(BASE_WIDTH, BASE_DEPTH, n)) for n in (16, 64, 256, 1024, 2560, 10240)
        ],
        f"MLP of {BASE_DEPTH} layers, N {BASE_BATCH}: width": [
            (w, mlp_of(w, BASE_DEPTH, BASE_BATCH)) for w in (32, 128, 512, 1280, 5120)
        ],
        f"MLP of width {BASE_WIDTH}, N {BASE_BATCH}: depth": [
            (d, mlp_of(BASE_WIDTH, d, BASE_BATCH)) for d in (1, 3, 10, 30, 120)
        ],
        "DCGAN 32 px: batch": [(n, dcgan_of(BASE_SIZE, n)) for n in (1, 8, 64, 640)],
        "DCGAN, N 2: pixels": [(s, dcgan_of(s, 2)) for s in (16, 32, 64, 128, 320)],
    }
    for axis, points in curves.items():
        for size, case in points:
            yield step_trial(f"{axis} {size}", Step.of(case, device), axis=axis, size=size)


def _of(name: str, step: Step, field: bool) -> Iterator[Trial]:
    if field:
        yield field_trial(f"{name}, eikonal", step)
        return
    yield penalty_trial(f"{name}, penalty", step)
    yield step_trial(f"{name}, step", step)


def penalty_trial(case: str, step: Step) -> Trial:
    """``gradient_penalty`` with its weight gradients, from the points on."""

    def points() -> Tensor:
        return plain_points(step.real, step.fake, step.eps, "wgan-gp")

    return _trial(
        case,
        step.ours(lambda: gpk.gradient_penalty(step.critic, step.real, step.fake, eps=step.eps)),
        step.gradients(lambda: plain_penalty(step.critic, points())),
        lambda: step.compiled(lambda critic: _penalty(critic, points())),
    )


def field_trial(case: str, step: Step) -> Trial:
    """``eikonal_loss`` with its weight gradients."""
    return _trial(
        case,
        step.ours(lambda: gpk.eikonal_loss(step.critic, step.real)),
        step.gradients(lambda: plain_penalty(step.critic, step.real)),
        lambda: step.compiled(lambda critic: _penalty(critic, step.real)),
    )


def step_trial(case: str, step: Step, **place: Any) -> Trial:
    """WGAN-GP critic step: ``CriticLoss`` with its weight gradients."""
    loss = gpk.CriticLoss(step.critic)

    def functional(critic: Callable[[Tensor], Tensor]) -> Tensor:
        points = plain_points(step.real, step.fake, step.eps, "wgan-gp")
        return critic(step.fake).mean() - critic(step.real).mean() + 10 * _penalty(critic, points)

    more = {}
    if jax_step.can_do(step.critic):
        more["jax"] = lambda: jax_step.step(step.critic, step.real, step.fake, step.eps)
    return _trial(
        case,
        step.ours(lambda: loss(step.real, step.fake, eps=step.eps).loss),
        step.gradients(lambda: plain_loss(step.critic, step.real, step.fake, step.eps)),
        lambda: step.compiled(functional),
        more,
        **place,
    )


def r1_trial(case: str, step: Step) -> Trial:
    """Logistic loss with R1 at the real data, which share a pass."""
    loss = gpk.CriticLoss(step.critic, objective="gan", penalty="r1")

    def functional(critic: Callable[[Tensor], Tensor]) -> Tensor:
        scores = nn.functional.softplus(-critic(step.real)).mean() + nn.functional.softplus(critic(step.fake)).mean()
        return scores + 10 * _penalty(critic, step.real, 0.0)

    return _trial(
        case,
        step.ours(lambda: loss(step.real, step.fake).loss),
        step.gradients(lambda: plain_loss(step.critic, step.real, step.fake, step.eps, "gan", "r1")),
        lambda: step.compiled(functional),
    )


def _penalty(critic: Callable[[Tensor], Tensor], points: Tensor, target: float = 1.0) -> Tensor:
    """Compute the penalty with torch.func, which a compiler can trace."""
    grad = torch.func.grad(lambda x: critic(x).sum())(points)
    squares = grad.flatten(1).square().sum(1)
    return squares.mean() if target == 0 else ((squares.sqrt() - target) ** 2).mean()


def _trial(
    case: str,
    ours: dict[str, Callable[[], Call]],
    eager: Call,
    compiled: Callable[[], Call],
    more: dict[str, Callable[[], Call]] | None = None,
    **place: Any,
) -> Trial:
    calls = {**ours, EAGER: lambda: eager, "compile": compiled, **(more or {})}
    return Trial(SUITE, case, calls, lambda: bare_products(ours[OURS]()), **place)
