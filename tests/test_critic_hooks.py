"""Hooks on activations and modules run in backward, and their changes take effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_exactly_as, batch
from critics import plain_loss, plain_penalty, plain_points
from gpkernels import backends

pytestmark = pytest.mark.skipif(backends.program is None, reason="without the native reader hooks cannot be seen")


class Hooked(nn.Module):
    """Doubles the gradient of an activation by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if h.requires_grad:
            h.register_hook(self._double)
        return self.last(h)

    def _double(self, gradient: Tensor) -> Tensor:
        self.calls += 1
        return 2 * gradient


def with_full_hook() -> nn.Module:
    critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    critic[1].register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
    return critic


@pytest.mark.parametrize(
    ("make", "together"),
    [(Hooked, None), (Hooked, False), (Hooked, True), (with_full_hook, None), (with_full_hook, False)],
)
def test_a_hook_changes_what_it_changes_in_pytorch(make: Callable[[], nn.Module], together: bool | None) -> None:
    torch.manual_seed(0)
    critic = make().double()
    loss = gpk.CriticLoss(critic, together=together)
    for _ in range(5):
        real, fake, eps = batch(5, 4)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)
        points = plain_points(real, fake, eps, "wgan-gp")
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
        assert_exactly_as(ours, plain_penalty(critic, points), critic)


def test_a_hook_is_called() -> None:
    critic = Hooked()
    gpk.r1_penalty(critic, torch.randn(5, 4))
    assert critic.calls > 0


class HookedInput(nn.Module):
    """Doubles the gradient at its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: 2 * gradient)
        return self.last(torch.tanh(self.first(x)))


def test_a_hook_on_the_samples_changes_the_penalty() -> None:
    torch.manual_seed(0)
    critic = HookedInput().double()
    loss = gpk.CriticLoss(critic)
    for _ in range(5):
        real, fake, eps = batch(5, 4)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
        assert_exactly_as(ours, plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp")), critic)
        x = real.clone().requires_grad_()
        (exact,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        assert_exactly_as(gpk.input_gradient(critic, real).exp().sum(), exact.exp().sum(), critic)


class Scaled(nn.Module):
    """With hooks on an activation, on a weight and on a value that was computed before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.raw = nn.Parameter(torch.randn(6))
        self.first.weight.register_hook(lambda gradient: 3 * gradient)

    def prepare(self) -> None:
        self.scale = self.raw * 1.5
        self.scale.register_hook(lambda gradient: 5 * gradient)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h.register_hook(lambda gradient: 2 * gradient)
        return self.last(h * self.scale)


@pytest.mark.parametrize("together", [None, True, False])
def test_hooks_on_weights_are_called_once(together: bool | None) -> None:
    torch.manual_seed(0)
    critic = Scaled().double()
    loss = gpk.CriticLoss(critic, together=together)
    for _ in range(5):
        real, fake, eps = batch(5, 4)
        critic.prepare()
        ours = loss(real, fake, eps=eps).loss
        critic.prepare()
        assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)
        critic.prepare()
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
        critic.prepare()
        assert_exactly_as(ours, plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp")), critic)
