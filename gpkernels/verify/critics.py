"""Penalties on critics of many kinds, or a user's, compared with the formulations found in public code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gpkernels as gpk
from gpkernels.verify.cases import DTYPES
from gpkernels.verify.result import Result, distance
from gpkernels.zoo import ResidualCritic, dcgan, mlp

Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""A penalty or loss of (critic, real, fake, eps), eps one per sample."""


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP, ReLU": (lambda: mlp(6, 32, 32, 1), (6,)),
    "MLP, tanh": (lambda: mlp(6, 32, 32, 1, activation=nn.Tanh), (6,)),
    "MLP, LayerNorm, SiLU": (lambda: mlp(6, 32, 32, 1, activation=nn.SiLU, norm=True), (6,)),
    "MLP, several outputs": (lambda: mlp(6, 32, 32, 4, activation=partial(nn.LeakyReLU, 0.2)), (6,)),
    "signed distance field": (lambda: mlp(3, 32, 32, 1, activation=partial(nn.Softplus, 10.0)), (3,)),
    "DCGAN": (lambda: dcgan(3, 8, 8), (3, 8, 8)),
    "residual, GroupNorm": (lambda: ResidualCritic(8, 8, "group_norm"), (3, 8, 8)),
    "residual, InstanceNorm": (lambda: ResidualCritic(8, 8, "instance_norm"), (3, 8, 8)),
}


def _input_gradient(critic: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = critic(x)
    out = out[0] if isinstance(out, (tuple, list)) else out
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True, retain_graph=True)
    return grad, x


def _mixed(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """Interpolate with eps of shape (N, 1) or (N, 1, 1, 1), as public code does."""
    weight = eps.view(-1, *[1] * (real.dim() - 1)).expand_as(real)
    return weight * real + (1 - weight) * fake


def _norm_over_all_but_the_batch(critic: Any, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    grad, _ = _input_gradient(critic, _mixed(real, fake, eps))
    return ((grad.view(grad.size(0), -1).norm(2, 1) - 1) ** 2).mean()


def _one_sided_with_a_root(critic: Any, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    grad, _ = _input_gradient(critic, _mixed(real, fake, eps))
    slopes = torch.sqrt(torch.sum(grad**2, dim=tuple(range(1, grad.dim()))))
    return torch.mean(torch.clamp(slopes - 1, min=0) ** 2)


def _r1_with_a_sum(critic: Any, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    grad, _ = _input_gradient(critic, real)
    return grad.pow(2).reshape(grad.shape[0], -1).sum(1).mean()


def _r2_with_a_sum(critic: Any, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    return _r1_with_a_sum(critic, fake, real, eps)


def _eikonal(critic: Any, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    grad, _ = _input_gradient(critic, real)
    return ((grad.norm(2, dim=-1) - 1) ** 2).mean()


def _whole_loss(critic: Any, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    scores = [out[0] if isinstance(out, (tuple, list)) else out for out in (critic(real), critic(fake))]
    return scores[1].mean() - scores[0].mean() + 10 * _norm_over_all_but_the_batch(critic, real, fake, eps)


# Public code's formulation, and its replacement.
IDIOMS: dict[str, tuple[Loss, Loss]] = {
    "calc_gradient_penalty": (
        _norm_over_all_but_the_batch,
        lambda critic, real, fake, eps: gpk.gradient_penalty(critic, real, fake, eps=eps),
    ),
    "one-sided, square root of a sum": (
        _one_sided_with_a_root,
        lambda critic, real, fake, eps: gpk.gradient_penalty(critic, real, fake, one_sided=True, eps=eps),
    ),
    "R1 with a sum": (_r1_with_a_sum, lambda critic, real, fake, eps: gpk.r1_penalty(critic, real)),
    "R2 with a sum": (_r2_with_a_sum, lambda critic, real, fake, eps: gpk.r2_penalty(critic, fake)),
    "eikonal": (_eikonal, lambda critic, real, fake, eps: gpk.eikonal_loss(critic, real)),
    "WGAN-GP, whole loss": (
        _whole_loss,
        lambda critic, real, fake, eps: gpk.CriticLoss(critic)(real, fake, eps=eps).loss,
    ),
}


def check_zoo(backend: str, dtype: str, device: torch.device) -> Iterator[Result]:
    """Check every critic of the zoo."""
    for name, (make, shape) in ZOO.items():
        torch.manual_seed(0)
        critic = _scaled(make(), torch.randn(64, *shape))
        yield from check_critic(critic, (8, *shape), name, backend, dtype, device)


def _scaled(critic: nn.Module, x: Tensor) -> nn.Module:
    """Scale the critic's last layer so that its input gradients have norms on both sides of 1."""
    grad, _ = _input_gradient(critic, x)
    *_, last = (layer for layer in critic.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        last.weight /= grad.flatten(1).norm(dim=1).mean()
    return critic


def check_critic(
    critic: nn.Module, shape: Sequence[int], name: str, backend: str, dtype: str, device: torch.device
) -> Iterator[Result]:
    """Check every formulation of a penalty, with its weight gradients; the eikonal loss for points alone.

    The critic is not changed.
    """
    for idiom in IDIOMS:
        if idiom != "eikonal" or len(shape) == 2:
            yield _check_idiom(idiom, critic, shape, name, backend, dtype, device)


def _check_idiom(
    idiom: str, critic: nn.Module, shape: Sequence[int], name: str, backend: str, dtype: str, device: torch.device
) -> Result:
    spelled, ours = IDIOMS[idiom]
    torch.manual_seed(1)
    batch = [torch.randn(*shape, dtype=torch.float64), 0.7 * torch.randn(*shape, dtype=torch.float64)]
    batch.append(torch.rand(shape[0], dtype=torch.float64))
    kind = DTYPES[dtype]
    exact = _value_and_gradients(spelled, critic, batch, torch.float64, torch.device("cpu"))
    plain = _value_and_gradients(spelled, critic, batch, kind, device)
    with gpk.backend(backend):
        got = _value_and_gradients(ours, critic, batch, kind, device)
    apart, usual = distance(got, exact), distance(plain, exact)
    ok = apart.relative <= 4 * usual.relative + 64 * torch.finfo(kind).eps
    numbers = (apart.absolute, apart.relative, usual.relative, apart.cosine)
    return Result("penalty", name, backend, dtype, idiom, ok, *numbers)


def _value_and_gradients(
    loss: Loss, critic: nn.Module, batch: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Compute [value, concatenated weight gradients] on a copy of the critic."""
    twin = copy.deepcopy(critic).to(device, dtype)
    weights = [p for p in twin.parameters() if p.requires_grad]
    value = loss(twin, *(x.to(device, dtype) for x in batch))
    found = torch.autograd.grad(value, weights, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    return [value.detach(), torch.cat([g.flatten() for g in grads])]
