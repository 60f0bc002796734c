"""Small critics with calls that have no rule: their losses are left to autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_exactly_as, batch
from critics import plain_loss, plain_penalty, plain_points
from gpkernels import backends
from gpkernels.bench.small import Calls, Cubed
from gpkernels.critic import plan
from gpkernels.critic.by_autograd import left_to_autograd

N, WIDTH = 5, 6


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.top, self.calls = nn.Linear(WIDTH, 8), nn.Linear(8, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.top(Cubed.apply(self.first(x)))


def cumulated(s: Any, x: Tensor) -> Tensor:
    return s.b(s.a(x).sigmoid().cumprod(1))


def labelled(s: Any, x: Tensor) -> Tensor:
    labels = torch.arange(len(x)) % 3
    return (Cubed.apply(s.a(x)) * s.classes(labels)).sum(1, keepdim=True)


def linear_parts() -> dict[str, nn.Module]:
    return {"a": nn.Linear(WIDTH, 8), "b": nn.Linear(8, 1)}


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "a custom function": Critic,
    "cumulated products": lambda: Calls(cumulated, **linear_parts()),
    "labels": lambda: Calls(labelled, a=nn.Linear(WIDTH, 8), classes=nn.Embedding(3, 8)),
}


@pytest.fixture(params=["native", "in Python"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run in C++, or in Python where the native path does not apply."""
    if request.param == "native":
        if backends.program is None:
            pytest.skip("the loop in C++ is not built")
        yield request.param
        return
    with gpk.backend("reference"):
        yield request.param


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PRODUCTS", {True: 1 << 28, False: 1 << 34})


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_every_critic_has_pytorchs_numbers(name: str, penalty: str, way: str) -> None:
    critic = CRITICS[name]().double()
    loss = gpk.CriticLoss(critic, penalty=penalty)
    for _ in range(4):
        real, fake, eps = batch(N, WIDTH)
        given = {"eps": eps} if penalty == "wgan-gp" else {}
        exact = plain_loss(critic, real, fake, eps, "wgan", penalty)
        assert_exactly_as(loss(real, fake, **given).loss, exact, critic)
        points = real if penalty == "r1" else plain_points(real, fake, eps, penalty)
        ours = gpk.r1_penalty(critic, real) if penalty == "r1" else gpk.gradient_penalty(critic, real, fake, **given)
        exact = plain_penalty(critic, points, 0.0 if penalty == "r1" else 1.0)
        assert_exactly_as(ours, exact, critic)
    assert left_to_autograd.has(critic, real)


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r2", "none"])
@pytest.mark.parametrize("objective", ["wgan", "gan"])
def test_a_whole_loss_has_pytorchs_numbers_in_every_call(objective: str, penalty: str, way: str) -> None:
    critic = Critic().double()
    loss = gpk.CriticLoss(critic, objective=objective, penalty=penalty)
    for _ in range(5):
        real, fake, eps = batch(N, WIDTH)
        exact = plain_loss(critic, real, fake, eps, objective, penalty)
        critic.calls = 0
        parts = loss(real, fake, eps=eps if penalty == "wgan-gp" else None)
        assert critic.calls == (3 if penalty == "wgan-gp" else 2)
        assert_exactly_as(parts.loss, exact, critic)
        assert left_to_autograd.has(critic, real)
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
    assert left_to_autograd.has(critic, points)
    assert not left_to_autograd.has(critic.eval(), points)
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
    assert not left_to_autograd.has(critic, points)


def test_a_larger_batch_is_judged_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PRODUCTS", {True: 2 * 4 * N * 8 * WIDTH, False: 1 << 34})
    critic = Critic().double()
    for rows, left in ((N, True), (8 * N, False), (N, True)):
        for _ in range(2):
            points, _, _ = batch(rows, WIDTH)
            assert_exactly_as(gpk.r1_penalty(critic, points), plain_penalty(critic, points, 0.0), critic)
        assert left_to_autograd.has(critic, points) == left


def settled(critic: nn.Module) -> Any:
    """The critic once it is left to autograd."""
    points, _, _ = batch(N, WIDTH)
    gpk.r1_penalty(critic.double(), points)
    assert left_to_autograd.has(critic, points)
    return critic


def test_points_are_rows_of_coordinates_in_an_eikonal_loss(way: str) -> None:
    critic = settled(Critic())
    points, _, _ = batch(N, 2, WIDTH)
    x = points.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    left_to_autograd.add(critic, points.numel())
    assert_exactly_as(gpk.eikonal_loss(critic, points), (g.norm(dim=-1) - 1).square().mean(), critic)


def test_more_inputs_reach_the_critic(way: str) -> None:
    critic = settled(Critic())
    forward = critic.forward
    critic.forward = lambda x, shift, *, scale: scale * forward(x + shift)
    real, fake, eps = batch(N, WIDTH)
    ours = gpk.gradient_penalty(
        critic, real, fake, eps=eps, one_sided=True, target=0.1, critic_args=(1.0,), critic_kwargs={"scale": 3.0}
    )
    exact = plain_penalty(lambda x: critic(x, 1.0, scale=3.0), plain_points(real, fake, eps, "wgan-gp"), 0.1, True)
    assert_exactly_as(ours, exact, critic)


def test_a_loss_scale_keeps_what_half_precision_would_round_away() -> None:
    """The derivative by a small input gradient is less than the least that float16 has."""
    half, rows, scale = settled(Critic()), 1 << 14, 2.0**14
    with torch.no_grad():
        half.top.weight.mul_(1e-4)
    half.half()
    exact = Critic().double()
    exact.load_state_dict(half.state_dict())
    points = torch.randn(rows, WIDTH).half()
    left_to_autograd.add(half, points.numel())
    (wanted,) = torch.autograd.grad(plain_penalty(exact, points.double(), 0.0), exact.first.weight)
    losses = gpk.r1_penalty(half, points), plain_penalty(half, points, 0.0)
    found = [torch.autograd.grad(loss * scale, half.first.weight)[0].double() / scale for loss in losses]
    ours, theirs = ((g - wanted).abs().max() for g in found)
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("whole", [True, False])
def test_a_loss_is_a_tensor_as_any_other(whole: bool) -> None:
    critic = settled(Critic())
    real, fake, eps = batch(N, WIDTH)
    loss_of = gpk.CriticLoss(critic)

    def made() -> Tensor:
        return loss_of(real, fake, eps=eps).loss if whole else gpk.gradient_penalty(critic, real, fake, eps=eps)

    exact = plain_loss(critic, real, fake, eps)
    if not whole:
        exact = plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"))
    loss, weights = made(), list(critic.parameters())
    first = torch.autograd.grad(loss, weights[0], retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(3 * loss, weights[0])[0], 3 * first)
    assert_exactly_as(made().mul_(2), 2 * exact, critic)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(made(), weights, create_graph=True)


def test_parts_may_be_changed_one_by_one() -> None:
    critic = settled(Critic())
    real, fake, eps = batch(N, WIDTH)
    for penalty in ("wgan-gp", "none"):
        loss = gpk.CriticLoss(critic, penalty=penalty)
        given = {"eps": eps} if penalty == "wgan-gp" else {}
        before = [x.detach().clone() for x in loss(real, fake, **given)]
        parts = loss(real, fake, **given)
        for x in parts[1:]:
            x.fill_(7.0)
        torch.testing.assert_close(parts.loss.detach(), before[0])
        assert [float(x) for x in parts[1:]] == [7.0] * 3


class Refused(ValueError):
    pass


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise Refused("not this way back")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_the_critic_raises_comes_out_as_it_is(where: str, way: str) -> None:
    critic = settled(Critic())
    forward = critic.forward

    def refuse(x: Tensor) -> Tensor:
        if where == "forward":
            raise Refused("not this way")
        return Refusing.apply(forward(x))

    critic.forward = refuse
    real, fake, _ = batch(N, WIDTH)
    for call in (lambda: gpk.gradient_penalty(critic, real, fake), lambda: gpk.CriticLoss(critic)(real, fake)):
        with pytest.raises(Refused, match="not this way"):
            call()


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda u, x: None, TypeError, "critic: expected scores as a tensor"),
        (lambda u, x: u.detach(), ValueError, "scores that depend on the input"),
        (lambda u, x: u.detach() * torch.ones(1, requires_grad=True), ValueError, "scores that depend on the input"),
        (lambda u, x: u.mean().reshape(1), ValueError, "pack"),
    ],
)
def test_bad_scores_are_refused(output: Any, error: type[Exception], message: str, way: str) -> None:
    critic = settled(Critic())
    forward = critic.forward
    critic.forward = lambda x: output(forward(x), x)
    real, fake, _ = batch(N, WIDTH)
    for call in (lambda: gpk.gradient_penalty(critic, real, fake), lambda: gpk.CriticLoss(critic)(real, fake)):
        with pytest.raises(error, match=message):
            call()


def test_distances_that_do_not_depend_on_the_points_are_those_of_the_field(way: str) -> None:
    field = settled(Critic())
    forward = field.forward
    field.forward = lambda x: forward(x).detach() * torch.ones(1, requires_grad=True)
    points, _, _ = batch(N, WIDTH)
    with pytest.raises(ValueError, match=r"^field: expected scores that depend on the input"):
        gpk.eikonal_loss(field, points)


class Scores(Tensor):
    """Scores of a class that C++ leaves to Python."""


def test_a_call_that_was_made_is_not_made_again() -> None:
    critic = settled(Critic())
    forward = critic.forward
    critic.forward = lambda x: forward(x).as_subclass(Scores)
    loss = gpk.CriticLoss(critic)
    real, fake, eps = batch(N, WIDTH)
    critic.calls = 0
    ours = loss(real, fake, eps=eps).loss
    assert critic.calls == 3
    assert_exactly_as(ours.as_subclass(Tensor), plain_loss(critic, real, fake, eps).as_subclass(Tensor), critic)


def test_autocast_is_the_users() -> None:
    critic = settled(Critic()).float()
    real, fake, eps = batch(64, WIDTH, dtype=torch.float32)
    left_to_autograd.add(critic, real.numel())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gpk.CriticLoss(critic)(real, fake, eps=eps).loss
        exact = plain_loss(critic, real, fake, eps)
    assert ours.dtype == torch.float32
    assert_exactly_as(ours, exact, critic, 2e-2)


def test_nothing_is_left_for_the_collector() -> None:
    critic = settled(Critic())
    real, fake, eps = batch(N, WIDTH)
    loss = gpk.CriticLoss(critic)

    def step() -> None:
        loss(real, fake, eps=eps).loss.backward()
        gpk.gradient_penalty(critic, real, fake, eps=eps).backward()

    step()
    while gc.collect():  # what finalizers let go of needs another round
        pass
    gc.disable()
    try:
        for _ in range(3):
            step()
        assert gc.collect() == 0
    finally:
        gc.enable()
