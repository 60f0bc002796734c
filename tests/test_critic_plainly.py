"""Small critics with calls that have no rule: their losses are left to autograd altogether."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_exactly_as, batch
from critics import plain_loss, plain_penalty
from gpkernels.critic import plan
from gpkernels.critic.by_autograd import plainly

N, WIDTH = 5, 6


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.top, self.calls = nn.Linear(WIDTH, 8), nn.Linear(8, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.top(Cubed.apply(self.first(x)))


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PRODUCTS", {True: 1 << 28, False: 1 << 34})


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r2", "none"])
@pytest.mark.parametrize("objective", ["wgan", "gan"])
def test_a_whole_loss_has_pytorchs_numbers_in_every_call(objective: str, penalty: str) -> None:
    critic = Critic().double()
    loss = gpk.CriticLoss(critic, objective=objective, penalty=penalty)
    for _ in range(5):
        real, fake, eps = batch(N, WIDTH)
        exact = plain_loss(critic, real, fake, eps, objective, penalty)
        critic.calls = 0
        parts = loss(real, fake, eps=eps if penalty == "wgan-gp" else None)
        assert critic.calls == (3 if penalty == "wgan-gp" else 2)
        assert_exactly_as(parts.loss, exact, critic)
        assert plainly.has(critic)
        assert not any(x.requires_grad for x in parts[1:])


@pytest.mark.parametrize("consistency", [0.0, 2.0])
def test_its_parts_are_those_of_the_graph(consistency: float, monkeypatch: pytest.MonkeyPatch) -> None:
    critic, twin = Critic().double(), Critic().double()
    twin.load_state_dict(critic.state_dict())
    ours, theirs = (gpk.CriticLoss(c, consistency_weight=consistency, together=False) for c in (critic, twin))
    for _ in range(3):
        real, fake, eps = batch(N, WIDTH)
        with monkeypatch.context() as patch:
            patch.setattr(plan, "PRODUCTS", {True: 0, False: 0})
            exact = theirs(real, fake, eps=eps)
        for a, b in zip(ours(real, fake, eps=eps), exact, strict=True):
            torch.testing.assert_close(a, b)


def test_a_penalty_has_pytorchs_numbers_and_more_inputs() -> None:
    critic = Critic().double()
    for _ in range(4):
        points, _, _ = batch(N, WIDTH)
        assert_exactly_as(gpk.r1_penalty(critic, points), plain_penalty(critic, points, 0.0), critic)
    with torch.no_grad():
        assert not gpk.r1_penalty(critic, points).requires_grad


def test_evaluation_is_told_from_training_and_nothing_is_kept_alive() -> None:
    critic = Critic().double()
    points, _, _ = batch(N, WIDTH)
    gpk.r1_penalty(critic, points)
    assert plainly.has(critic)
    assert not plainly.has(critic.eval())
    found = weakref.ref(critic)
    del critic
    gc.collect()
    assert found() is None


def test_scores_of_several_samples_are_refused_as_ever() -> None:
    critic = Critic().double()
    points, _, _ = batch(N, WIDTH)
    gpk.r1_penalty(critic, points)
    critic.top = nn.Flatten(0)  # type: ignore[assignment]
    critic.forward = lambda x: Cubed.apply(critic.first(x)).mean().reshape(1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="pack"):
        gpk.r1_penalty(critic, points)


def test_a_critic_with_much_to_multiply_goes_by_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PRODUCTS", {True: 2 * N * 8 * WIDTH, False: 1 << 34})
    critic = Critic().double()
    for _ in range(3):
        points, _, _ = batch(N, WIDTH)
        assert_exactly_as(gpk.r1_penalty(critic, points), plain_penalty(critic, points, 0.0), critic)
    assert not plainly.has(critic)
