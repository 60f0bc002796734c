"""Launches and bytes of critic steps, counted with emulated CUDA kernels; no time is measured."""

from __future__ import annotations

from collections.abc import Callable

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
    assert ours.total < 0.45 * eager.total
    assert ours.bytes < 0.7 * eager.bytes


@pytest.mark.parametrize(("penalty", "share"), [("r1", 0.75), ("none", 1)])
def test_other_steps_of_an_mlp_launch_less_than_plain_pytorch(penalty: str, share: float) -> None:
    ours, eager = _counted(mlp(6, 32, 32, 1), 16, 6, penalty=penalty)
    assert ours.total < share * eager.total
    assert ours.bytes < eager.bytes


@pytest.mark.parametrize(
    ("make", "launches", "moved"),
    [
        (lambda: dcgan(3, 8, 16), 0.45, 0.65),
        (lambda: ResidualCritic(8, 16), 0.4, 0.9),
        (lambda: ResidualCritic(8, 16, "layer_norm"), 0.33, 0.65),
    ],
    ids=["dcgan", "residual", "residual with layer norm"],
)
def test_an_image_critics_step_launches_less_and_moves_less_than_plain_pytorch(
    make: Callable[[], nn.Module], launches: float, moved: float
) -> None:
    ours, eager = _counted(make(), 4, 3, 16, 16)
    assert ours.total < launches * eager.total
    assert ours.bytes < moved * eager.bytes


def test_views_are_no_launches_and_copies_are() -> None:
    x = torch.randn(4, 6)
    assert launches_of(lambda: x.t()[1:].unsqueeze(0).detach()).total == 0
    assert launches_of(lambda: x.t().contiguous()).total == 1
    counted = launches_of(lambda: torch.add(x, x))
    assert (counted.total, counted.bytes) == (1, 2 * x.numel() * 4)
