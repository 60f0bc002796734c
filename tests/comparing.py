"""References for tests of the critic step: plain PyTorch's loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence

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


def assert_exactly_as(
    ours: Tensor, exact: Tensor, critic: nn.Module, tolerance: float = 1e-9, inputs: Sequence[Tensor] = ()
) -> None:
    """The same value and gradients, gradients of zeros where PyTorch has them, and None where it has None.

    tolerance: relative. Weights and gradients are about 1, and what cancels to nothing may leave a few roundings.
    """
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
    named = {name: p for name, p in critic.named_parameters() if p.requires_grad}
    named |= {f"input {i}": x for i, x in enumerate(inputs)}
    pairs = [torch.autograd.grad(loss, list(named.values()), allow_unused=True) for loss in (ours, exact)]
    scale = max([1.0, *(float(g.abs().max()) for g in pairs[1] if g is not None)])
    for name, a, b in zip(named, *pairs, strict=True):
        assert (a is None) == (b is None), f"{name}: {a} where PyTorch has {b}"
        if a is None or b is None:
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        assert error <= tolerance * (largest + 1e-4 * scale), f"{name}: {error} of {largest}"
