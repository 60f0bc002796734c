"""No wasted work, counted: products and convolutions in units of one forward pass over one batch, L."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from counting import counted
from critics import Featured, MaxPooled, ResidualCritic, dcgan, mlp, plain_loss, plain_penalty

CRITICS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (mlp(2, 512, 512, 512, 1), torch.randn(16, 2)),
    "dcgan": lambda: (dcgan(3, 64, 32), torch.randn(2, 3, 32, 32)),
    "residual": lambda: (ResidualCritic(32, 32), torch.randn(2, 3, 32, 32)),
    "max_pooled": lambda: (MaxPooled(3, 32), torch.randn(2, 3, 16, 16)),
}


@pytest.fixture(params=CRITICS)
def setting(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, float]:
    critic, real = CRITICS[request.param]()
    fake = torch.randn_like(real)
    critic(real)

    def forward() -> None:
        with torch.no_grad():
            critic(real)

    return critic, real, fake, counted(forward).flops


def weights(critic: nn.Module) -> list[nn.Parameter]:
    return list(critic.parameters())


def test_a_penalty_takes_four_passes(setting: tuple[nn.Module, Tensor, Tensor, float]) -> None:
    critic, real, fake, unit = setting
    count = counted(
        lambda: torch.autograd.grad(gpk.gradient_penalty(critic, real, fake), weights(critic), allow_unused=True)
    )
    assert count.flops <= 4.05 * unit
    assert not count.zeros


def test_eager_takes_six_and_multiplies_zeros(setting: tuple[nn.Module, Tensor, Tensor, float]) -> None:
    critic, real, _, unit = setting
    count = counted(lambda: torch.autograd.grad(plain_penalty(critic, real), weights(critic), allow_unused=True))
    assert count.flops >= 5.6 * unit
    assert count.zeros


def test_a_wgan_gp_step_takes_ten(setting: tuple[nn.Module, Tensor, Tensor, float]) -> None:
    critic, real, fake, unit = setting
    loss = gpk.CriticLoss(critic)
    count = counted(lambda: torch.autograd.grad(loss(real, fake).loss, weights(critic)))
    assert count.flops <= 10.05 * unit
    assert not count.zeros


@pytest.mark.parametrize("objective", ["wgan", "gan"])
def test_r1_adds_its_real_part_to_four(setting: tuple[nn.Module, Tensor, Tensor, float], objective: str) -> None:
    critic, real, fake, unit = setting
    loss = gpk.CriticLoss(critic, objective=objective, penalty="r1")
    count = counted(lambda: torch.autograd.grad(loss(real, fake).loss, weights(critic)))
    fake_part = 3 * unit
    assert count.flops - fake_part <= 4.05 * unit
    assert not count.zeros


def test_labels_that_pick_a_logit_of_each_row_keep_r1_at_four() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(64, 256, 256, 10)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.body(x)[torch.arange(len(x)), labels]

    critic, real, fake, labels = Picks(), torch.randn(16, 64), torch.randn(16, 64), torch.arange(16) % 10
    unit = counted(lambda: critic(real, labels)).flops
    loss = gpk.CriticLoss(critic, objective="gan", penalty="r1")
    count = counted(lambda: torch.autograd.grad(loss(real, fake, critic_args=(labels,)).loss, weights(critic)))
    assert count.flops <= 7.05 * unit  # of which the fake scores take 3


def test_the_consistency_term_adds_three() -> None:
    critic = Featured(256, 0.5)
    real, fake = torch.randn(32, 6), torch.randn(32, 6)

    def flops(**options: float) -> int:
        loss = gpk.CriticLoss(critic, **options)
        return counted(lambda: torch.autograd.grad(loss(real, fake).loss, weights(critic))).flops

    with torch.no_grad():
        unit = counted(lambda: critic(real)).flops
    assert flops(consistency_weight=2.0) - flops() <= 3.05 * unit


def test_frozen_layers_cost_no_weight_gradient() -> None:
    critic = mlp(64, 64, 64, 64, 1)
    real, fake = torch.randn(8, 64), torch.randn(8, 64)
    loss = gpk.CriticLoss(critic)
    unit = counted(lambda: critic(real)).flops
    everything = counted(lambda: torch.autograd.grad(loss(real, fake).loss, weights(critic))).flops
    for layer in (critic[0], critic[2]):
        layer.requires_grad_(False)
    left = [p for p in critic.parameters() if p.requires_grad]
    frozen = counted(lambda: torch.autograd.grad(loss(real, fake).loss, left)).flops
    # Two of three layers: three weight gradients each, and two batches need not be pulled through the second.
    assert everything - frozen >= 0.6 * 3 * unit


def test_rpgan_with_r1_and_r2_takes_eight_and_without_them_six(
    setting: tuple[nn.Module, Tensor, Tensor, float],
) -> None:
    critic, real, fake, unit = setting
    loss = gpk.CriticLoss(critic, objective="relativistic", penalty={"r1": 0.5, "r2": 0.5}, penalty_every=2)
    for most in (8.05, 6.05):
        count = counted(lambda: torch.autograd.grad(loss(real, fake).loss, weights(critic)))
        assert count.flops <= most * unit
        assert not count.zeros


def test_eager_rpgan_with_r1_and_r2_takes_twelve() -> None:
    critic, real = CRITICS["mlp"]()
    fake = torch.randn_like(real)
    unit = counted(lambda: critic(real)).flops

    def step() -> Tensor:
        scores, penalties = [], []
        for x in (real.clone().requires_grad_(), fake.clone().requires_grad_()):
            scores.append(critic(x))
            (gradient,) = torch.autograd.grad(scores[-1].sum(), x, create_graph=True)
            penalties.append(gradient.square().flatten(1).sum(1).mean())
        return nn.functional.softplus(scores[1] - scores[0]).mean() + 0.5 * (penalties[0] + penalties[1])

    count = counted(lambda: torch.autograd.grad(step(), weights(critic), allow_unused=True))
    assert 11.5 * unit <= count.flops <= 12.5 * unit


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_an_output_that_no_loss_reads_costs_its_forward_pass_alone(activation: type[nn.Module]) -> None:
    body, head = mlp(2, 64, 64, activation=activation), mlp(64, 1)
    other = mlp(64, 256, 256, 10, activation=activation)

    class TwoHeads(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return head(x := body(x)), other(x)

    real, fake = torch.randn(16, 2), torch.randn(16, 2)
    unit = counted(lambda: other(torch.randn(16, 64))).flops
    trained = [*body.parameters(), *head.parameters()]

    def flops(critic: Callable[..., Any], step: Callable[..., Tensor]) -> float:
        return counted(lambda: torch.autograd.grad(step(critic, real, fake), trained, allow_unused=True)).flops

    steps = (gpk.gradient_penalty, 1), (lambda critic, *xs: gpk.CriticLoss(critic)(*xs).loss, 3)
    for step, batches in steps:
        assert flops(TwoHeads(), step) == flops(nn.Sequential(body, head), step) + batches * unit


def test_without_grad_mode_only_values_are_computed(setting: tuple[nn.Module, Tensor, Tensor, float]) -> None:
    critic, real, fake, unit = setting
    loss = gpk.CriticLoss(critic)
    with torch.no_grad():
        assert counted(lambda: gpk.gradient_penalty(critic, real, fake)).flops <= 2.05 * unit
        assert counted(lambda: loss(real, fake)).flops <= 4.05 * unit


def test_eager_step_takes_twelve() -> None:
    critic, real = CRITICS["mlp"]()
    fake, eps = torch.randn_like(real), torch.rand(len(real))
    unit = counted(lambda: critic(real)).flops
    count = counted(lambda: torch.autograd.grad(plain_loss(critic, real, fake, eps), weights(critic)))
    assert 11.5 * unit <= count.flops <= 12.5 * unit


def test_drop_in_layers_skip_the_zeros() -> None:
    critic = mlp(2, 512, 512, 512, 1)
    real = torch.randn(16, 2)
    unit = counted(lambda: critic(real)).flops

    def penalty() -> None:
        with gpk.fast_double_backward():
            torch.autograd.grad(plain_penalty(critic, real), weights(critic), allow_unused=True)

    count = counted(penalty)
    assert count.flops <= 4.05 * unit
    assert not count.zeros
