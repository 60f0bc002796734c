"""Launches and bytes of critic steps, counted with emulated CUDA kernels; no time is measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import emulated
import gpkernels as gpk
from critics import ResidualCritic, dcgan, mlp, plain_loss
from launches import Launches, launches_of

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")


def _counted(critic: nn.Module, *shape: int, penalty: str = "wgan-gp") -> tuple[Launches, Launches]:
    """Our step, of one batch as it is from the third call on, and PyTorch's, each with backward."""
    real, fake = torch.randn(shape), torch.randn(shape)
    loss = gpk.CriticLoss(critic, penalty=penalty, together=True)
    ours = launches_of(lambda: loss(real, fake).loss.backward())
    eager = launches_of(lambda: plain_loss(critic, real, fake, torch.rand(shape[0]), penalty=penalty).backward())
    return ours, eager


def test_a_toy_mlps_step_launches_less_than_half_of_plain_pytorch() -> None:
    ours, eager = _counted(mlp(2, 512, 512, 512, 1), 256, 2)
    assert ours.total < 0.5 * eager.total
    assert ours.bytes < 0.7 * eager.bytes


@pytest.mark.parametrize("penalty", ["r1", "none"])
def test_other_steps_of_an_mlp_launch_less_than_plain_pytorch(penalty: str) -> None:
    ours, eager = _counted(mlp(6, 32, 32, 1), 16, 6, penalty=penalty)
    assert ours.total < eager.total


@pytest.mark.parametrize("kind", ["dcgan", "residual"])
def test_an_image_critics_step_launches_less_and_moves_less_than_plain_pytorch(kind: str) -> None:
    critic = dcgan(3, 8, 16) if kind == "dcgan" else ResidualCritic(8, 16)
    ours, eager = _counted(critic, 4, 3, 16, 16)
    assert ours.total < 0.95 * eager.total
    assert ours.bytes < 0.85 * eager.bytes


def test_views_are_no_launches_and_copies_are() -> None:
    x = torch.randn(4, 6)
    assert launches_of(lambda: x.t()[1:].unsqueeze(0).detach()).total == 0
    assert launches_of(lambda: x.t().contiguous()).total == 1
    counted = launches_of(lambda: torch.add(x, x))
    assert (counted.total, counted.bytes) == (1, 2 * x.numel() * 4)
