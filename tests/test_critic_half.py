"""Gradients under float16 and a loss scale: at most four times plain PyTorch's errors, tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from critics import mlp, plain_loss

SCALE = 2.0**10


def _deep() -> nn.Module:
    """Gradients of the first layer are too small for float16 where nothing scales them."""
    critic = mlp(4, 32, 32, 32, 1, activation=nn.LeakyReLU)
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(0.2)
    return critic


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(32, 1),
    )


def _scaled(loss: Tensor, critic: nn.Module) -> list[Tensor | None]:
    """The gradients that an optimiser sees after a GradScaler has taken the scale away again."""
    found = torch.autograd.grad(loss * SCALE, list(critic.parameters()), allow_unused=True)
    return [None if g is None else g.double() / SCALE for g in found]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("make", "shape"), [(_deep, (64, 4)), (_convolutional, (16, 3, 8, 8))])
def test_a_loss_scale_keeps_small_gradients(make: object, shape: tuple[int, ...], together: bool) -> None:
    torch.manual_seed(0)
    critic = make()  # type: ignore[operator]
    real, fake, eps = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
    exact = copy.deepcopy(critic).double()
    wanted = torch.autograd.grad(
        plain_loss(exact, real.double(), fake.double(), eps.double()), list(exact.parameters()), allow_unused=True
    )
    loss = gpk.CriticLoss(critic, together=together)
    with torch.autocast("cpu", torch.float16):
        plain = _scaled(plain_loss(critic, real, fake, eps), critic)
        ours = [_scaled(loss(real, fake, eps=eps).loss, critic) for _ in range(4)]
    for found in ours:
        for a, b, c in zip(found, plain, wanted, strict=True):
            if c is None or b is None or a is None or c.norm() == 0:
                continue
            error, allowed = float((a - c).norm()), float((b - c).norm())
            assert error <= 4 * allowed + 2e-3 * float(c.norm())
