"""Norms of a critic's input gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gpkernels


def gradient_norms(critic: nn.Module, points: Tensor) -> Tensor:
    """Compute |grad D| at each point, (N,). points: (N, *)."""
    points = points.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(points).sum(), points)
    return grad.flatten(1).norm(dim=1)


def mean_gradient_norm(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> float:
    """Estimate E |grad D| at interpolates of real and fake."""
    eps = torch.rand(len(real), generator=generator).to(real)
    return gradient_norms(critic, gpkernels.interpolate(real, fake, eps)).mean().item()
