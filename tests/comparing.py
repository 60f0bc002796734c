"""What tests of the critic step compare with: plain PyTorch's loss and gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gpkernels as gpk

PENALTIES = ("none", "wgan-gp", "r1", "r2")


def gradients(loss: Tensor, critic: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Gradients of every weight and input; zeros where PyTorch gives None."""
    leaves = [*(p for p in critic.parameters() if p.requires_grad), *inputs]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def recorded(critic: nn.Module, **options: object) -> gpk.CriticLoss:
    """A CriticLoss that fails where it would leave the critic to autograd."""
    loss = gpk.CriticLoss(critic, **options)

    def refuse(*_: object) -> None:
        raise AssertionError("left to autograd")

    loss._composed = refuse
    return loss


def assert_same(ours: list[Tensor], exact: list[Tensor], tolerance: float = 1e-10) -> None:
    scale = max(float(g.detach().abs().max()) for g in exact)
    for a, b in zip(ours, exact, strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance * scale


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), 0.7 * torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=dtype)
