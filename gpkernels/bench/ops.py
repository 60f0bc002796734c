"""Suite of single ops, against PyTorch's operations and memory bandwidth."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

import gpkernels as gpk
from gpkernels.bench.clock import Call
from gpkernels.bench.machine import last_level_cache, memory
from gpkernels.bench.trial import EAGER, OURS, Trial

SUITE = "ops"
SMALL, IMAGES = (64, 2), (64, 3, 32, 32)
Loss = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = tuple(round(10 ** (1 + 5 * ((37 * i) % 100) / 99)) for i in range(100))  # of 10 to a million elements


@dataclass(frozen=True)
class Batch:
    """Arguments of ops.

    real, fake: (N, *). eps: (N,). cotangent: like real. leaves: the first two, requiring grad. scores: (N, 1), two of
    them, requiring grad.
    """

    real: Tensor
    fake: Tensor
    eps: Tensor
    cotangent: Tensor
    leaves: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, shape: tuple[int, ...], device: torch.device) -> Batch:
        real, fake, cotangent = (torch.randn(shape, device=device) for _ in range(3))
        scores = tuple(torch.randn(shape[0], 1, device=device, requires_grad=True) for _ in range(2))
        leaves = (real.detach().requires_grad_(), fake.detach().requires_grad_())
        return cls(real, fake, torch.rand(shape[0], device=device), cotangent, leaves, scores)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """eps, shaped for broadcasting."""
        return self.eps.view(-1, *[1] * (self.real.dim() - 1))


@dataclass(frozen=True)
class Op:
    """ours, eager: calls on a batch. arrays: how many arrays of the batch's size must be read or written, each once."""

    ours: Callable[[Batch], Call]
    eager: Callable[[Batch], Call]
    arrays: int


def mixed(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return weight * x + (1 - weight) * y


def penalty(grad: Tensor) -> Tensor:
    return ((grad.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def consistency(s: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    distance = (s - t).square().sum(1) + 0.1 * (x - y).square().flatten(1).mean(1)
    return distance.clamp(min=0).mean()


def lipschitz(s: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return ((s - t).flatten(1).norm(2, dim=1) / (x - y).flatten(1).norm(2, dim=1)).clamp(min=0).mean()


def backward(value: Tensor, leaves: tuple[Tensor, ...], cotangent: Tensor | None = None) -> Call:
    """Return a call that computes the first derivative of a retained graph."""
    return partial(torch.autograd.grad, value, leaves, cotangent, retain_graph=True)


# Each loss of scores: ours and PyTorch's of real and generated scores, and how many of the two it reads.
LOSSES: dict[str, tuple[Loss, Loss, int]] = {
    "wgan_critic_loss": (gpk.wgan_critic_loss, lambda real, fake: fake.mean() - real.mean(), 2),
    "wgan_generator_loss": (lambda _, fake: gpk.wgan_generator_loss(fake), lambda _, fake: -fake.mean(), 1),
    "hinge_critic_loss": (
        gpk.hinge_critic_loss,
        lambda real, fake: relu(1 - real).mean() + relu(1 + fake).mean(),
        2,
    ),
    "gan_discriminator_loss": (
        gpk.gan_discriminator_loss,
        lambda real, fake: softplus(-real).mean() + softplus(fake).mean(),
        2,
    ),
    "saturating_generator_loss": (
        lambda _, fake: gpk.saturating_generator_loss(fake),
        lambda _, fake: -softplus(fake).mean(),
        1,
    ),
    "nonsaturating_generator_loss": (
        lambda _, fake: gpk.nonsaturating_generator_loss(fake),
        lambda _, fake: softplus(-fake).mean(),
        1,
    ),
    "least_squares_critic_loss": (
        gpk.least_squares_critic_loss,
        lambda real, fake: (real - 1).square().mean() + fake.square().mean(),
        2,
    ),
    "least_squares_generator_loss": (
        lambda _, fake: gpk.least_squares_generator_loss(fake),
        lambda _, fake: (fake - 1).square().mean(),
        1,
    ),
    "relativistic_critic_loss": (gpk.relativistic_critic_loss, lambda real, fake: softplus(fake - real).mean(), 2),
    "relativistic_generator_loss": (
        gpk.relativistic_generator_loss,
        lambda real, fake: softplus(real - fake).mean(),
        2,
    ),
}


def value_of(ours: Loss, eager: Loss, groups: int) -> Op:
    return Op(lambda b: lambda: ours(b.real, b.fake), lambda b: lambda: eager(b.real, b.fake), groups)


def slopes_of(ours: Loss, eager: Loss, groups: int) -> Op:
    def of(loss: Loss) -> Callable[[Batch], Call]:
        return lambda b: backward(loss(*b.leaves), b.leaves[-groups:])

    return Op(of(ours), of(eager), 2 * groups)


OPS: dict[str, Op] = {
    "interpolate": Op(
        lambda b: lambda: gpk.interpolate(b.real, b.fake, b.eps),
        lambda b: lambda: mixed(b.real, b.fake, b.weight),
        3,
    ),
    "interpolate, backward": Op(
        lambda b: backward(gpk.interpolate(*b.leaves, b.eps), b.leaves, b.cotangent),
        lambda b: backward(mixed(*b.leaves, b.weight), b.leaves, b.cotangent),
        3,
    ),
    "add_instance_noise": Op(
        lambda b: lambda: gpk.add_instance_noise(b.real, 0.1),
        lambda b: lambda: b.real + 0.1 * torch.randn_like(b.real),
        2,
    ),
    "gradient_norm_penalty": Op(
        lambda b: lambda: gpk.gradient_norm_penalty(b.real),
        lambda b: lambda: penalty(b.real),
        1,
    ),
    "gradient_norm_penalty, backward": Op(
        lambda b: backward(gpk.gradient_norm_penalty(b.leaves[0]), b.leaves[:1]),
        lambda b: backward(penalty(b.leaves[0]), b.leaves[:1]),
        2,
    ),
    "consistency_term": Op(
        lambda b: lambda: gpk.consistency_term(*b.scores, b.real, b.fake),
        lambda b: lambda: consistency(*b.scores, b.real, b.fake),
        2,
    ),
    "consistency_term, backward": Op(
        lambda b: backward(gpk.consistency_term(*b.scores, *b.leaves), (*b.scores, *b.leaves)),
        lambda b: backward(consistency(*b.scores, *b.leaves), (*b.scores, *b.leaves)),
        4,
    ),
    "lipschitz_consistency": Op(
        lambda b: lambda: gpk.lipschitz_consistency(*b.scores, b.real, b.fake),
        lambda b: lambda: lipschitz(*b.scores, b.real, b.fake),
        2,
    ),
    **{
        name + suffix: op
        for name, (ours, eager, groups) in LOSSES.items()
        for suffix, op in {"": value_of(ours, eager, groups), ", backward": slopes_of(ours, eager, groups)}.items()
    },
    "clip_weights_": Op(
        lambda b: lambda: gpk.clip_weights_([b.cotangent], 0.5),
        lambda b: lambda: b.cotangent.clamp_(-0.5, 0.5),
        2,
    ),
}


def trials(device: torch.device, quick: bool) -> Iterator[Trial]:
    """Yield every op on arrays larger than the caches, on images, and on arrays so small that overhead dominates."""
    places = {"small": SMALL} if quick else {"large": beyond_caches(device), "images": IMAGES, "small": SMALL}
    for place, shape in places.items():
        batch = Batch.draw(shape, device)
        for name, op in OPS.items():
            yield _trial(f"{name}, {place} {'x'.join(map(str, shape))}", op, batch)
        if place == "small":
            yield _least_call(batch)
    yield _optimiser(device)


def growth(device: torch.device) -> Iterator[Trial]:
    """Yield each op from a thousand elements up to arrays larger than the caches."""
    most = beyond_caches(device)[1]
    for cols in sorted({4, 64, 1024, 16384, most}):
        batch = Batch.draw((256, cols), device)
        for name, op in OPS.items():
            yield _trial(f"{name}, 256x{cols}", op, batch, axis=f"{name}: elements", size=256 * cols)


def beyond_caches(device: torch.device) -> tuple[int, int]:
    """Return a shape whose float32 array is 1.5 times the last-level cache, and at least 64 MB.

    On a CPU it is 1/48 of the memory at most: a virtual machine may show a cache of which it has a share alone.
    """
    size: float = 384 << 20
    if device.type == "cpu":
        size = min(max(64 << 20, last_level_cache() * 1.5), memory() / 48)
    return 256, int(size) // (4 * 256 * 64) * 64


def copy(x: Tensor) -> Call:
    """Return a copy of an array to memory that was already touched: a bound by memory bandwidth."""
    to = torch.empty_like(x).copy_(x)
    if x.is_cuda:
        return lambda: to.copy_(x)
    return lambda: ctypes.memmove(to.data_ptr(), x.data_ptr(), x.numel() * x.element_size())


def _trial(case: str, op: Op, batch: Batch, **place: Any) -> Trial:
    def compiled() -> Call:
        call = torch.compile(op.eager(batch))
        return lambda: call()

    calls: dict[str, Callable[[], Call]] = {OURS: lambda: op.ours(batch), EAGER: lambda: op.eager(batch)}
    if "backward" not in case:  # a retained graph exists before a compiler sees it
        calls["compile"] = compiled
    return Trial(SUITE, case, calls, lambda: copy(batch.real), limit_share=2 / op.arrays, **place)


def _least_call(batch: Batch) -> Trial:
    """Return one of PyTorch's own elementwise operations, as a bound for small arrays."""
    call = {OURS: lambda: partial(torch.add, batch.real, batch.fake)}
    return Trial(SUITE, "torch.add, small", {**call, EAGER: call[OURS]}, lambda: copy(batch.real), limit_share=2 / 3)


def _optimiser(device: torch.device) -> Trial:
    """Yield RMSprop with clipping over many tensors of mixed sizes, as in WGAN training."""

    def weights() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(n, device=device) * 0.01) for n in WEIGHTS]
        for w in made:
            w.grad = torch.randn_like(w) * 0.01
        return made

    def ours() -> Call:
        return gpk.optim.RMSprop(weights(), lr=5e-5, clip=0.01).step

    def foreach() -> Call:
        held = weights()
        optimiser = torch.optim.RMSprop(held, lr=5e-5, foreach=True)

        def step() -> None:
            optimiser.step()
            with torch.no_grad():
                for w in held:
                    w.clamp_(-0.01, 0.01)

        return step

    total = torch.randn(sum(WEIGHTS), device=device)
    case = f"optim.RMSprop with clip, {len(WEIGHTS)} tensors (eager: foreach, then clamp_)"
    # Reads weights, gradients and square averages; writes weights and square averages.
    return Trial(SUITE, case, {OURS: ours, EAGER: foreach}, lambda: copy(total), limit_share=2 / 5)
