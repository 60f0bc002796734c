"""Steps that are made like the last one: whatever decided how it was made may change before the next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import gpkernels as gpk
from comparing import assert_same, batch, gradients
from critics import mlp, plain_loss
from gpkernels import backends
from scored import WIDTH, N, Scored, functions_called

pytestmark = [
    pytest.mark.skipif(backends.program is None, reason="the loop in C++ is not built"),
    pytest.mark.usefixtures("rules_or_autograd"),
]

Change = Callable[[gpk.CriticLoss], object]


def to(name: str, value: object) -> Change:
    return lambda loss: setattr(loss, name, value)


def replace_the_top(loss: gpk.CriticLoss) -> None:
    torch.manual_seed(1)
    loss.critic.top = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()


CHANGES: dict[str, tuple[dict[str, Any], Change]] = {
    **{name: ({}, to("objective", name)) for name in ("gan", "hinge", "least-squares", "relativistic")},
    **{f"penalty {name}": ({}, to("penalty", name)) for name in ("r1", "r2", "none")},
    "penalties": ({}, to("penalty", {"r1": 0.5, "wgan-gp": 3.0})),
    "a weight in place": ({"penalty": {"r1": 0.5, "r2": 1.0}}, lambda loss: loss.penalty.update(r1=2.0)),
    "a penalty less": ({"penalty": {"r1": 0.5, "r2": 1.0}}, lambda loss: loss.penalty.pop("r1")),
    "penalty_weight": ({}, to("penalty_weight", 3.0)),
    "penalty_weight of another type": ({}, to("penalty_weight", torch.tensor(3.0))),
    "target": ({}, to("target", 0.5)),
    "one_sided": ({}, to("one_sided", True)),
    "power": ({}, to("power", 3.0)),
    "real_target": ({"objective": "least-squares"}, to("real_target", 0.5)),
    "fake_target": ({"objective": "least-squares"}, to("fake_target", -0.5)),
    "consistency_weight": ({}, to("consistency_weight", 2.0)),
    "consistency_margin": ({"consistency_weight": 2.0}, to("consistency_margin", 0.01)),
    "feature_weight": ({"consistency_weight": 2.0}, to("feature_weight", 0.7)),
    "pack": ({"penalty": "r1"}, to("pack", 2)),
    "apart": ({}, to("together", False)),
    "a layer": ({}, replace_the_top),
    "a frozen layer": ({}, lambda loss: loss.critic.top.requires_grad_(False)),
}


def settled(**options: Any) -> gpk.CriticLoss:
    """A loss whose last step the next one is made like."""
    torch.manual_seed(0)
    loss = gpk.CriticLoss(Scored().double().eval(), **options)
    mixes = options.get("penalty", "wgan-gp") == "wgan-gp"
    for _ in range(6):
        real, fake, eps = batch(N, WIDTH)
        loss(real, fake, eps=eps if mixes else None).loss.backward()
    loss.zero_grad()
    in_python = isinstance(loss.penalty, dict) or loss.consistency_weight
    assert (loss._seen.last is None) == bool(Scored.cubes and in_python)
    return loss


def assert_as_new(loss: gpk.CriticLoss, *args: Tensor, tolerance: float = 1e-11, **options: Any) -> None:
    """Twice the same results as a loss that was never called."""
    for _ in range(2):
        fresh = copy.copy(loss)
        fresh._seen = type(loss._seen)()
        torch.manual_seed(2)
        ours = loss(*args, **options)
        torch.manual_seed(2)
        exact = fresh(*args, **options)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert ours.loss.requires_grad == exact.loss.requires_grad
        if ours.loss.requires_grad:
            assert_same(gradients(ours.loss, loss.critic), gradients(exact.loss, loss.critic), tolerance)


@pytest.mark.parametrize("eps_is_given", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_settled_step_asks_little(shift: float, eps_is_given: bool) -> None:
    loss = settled()
    more: dict[str, Any] = {"critic_args": (shift,)} if shift else {}

    def step(**others: Any) -> None:
        real, fake, eps = batch(N, WIDTH)
        loss(real, fake, eps=eps if eps_is_given else None, **more, **others)

    for _ in range(6):
        step()
    assert 3 <= len(functions_called(step)) <= 4
    assert len(functions_called(lambda: step(with_penalty=True))) > 20  # decided anew
    assert len(functions_called(step)) <= 4


def test_batches_of_other_sizes_are_settled() -> None:
    loss = settled()
    for n in (N, 2 * N, 3, N):
        real, fake, eps = batch(n, WIDTH)
        assert_as_new(loss, real, fake, eps=eps)
        called = [functions_called(partial(loss, real, fake, eps=eps)) for _ in range(3)]
        assert len(called[-1]) <= 4


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_heeded(name: str) -> None:
    options, change = CHANGES[name]
    loss = settled(**options)
    change(loss)
    real, fake, eps = batch(N, WIDTH)
    given = {"eps": eps} if loss.penalty == "wgan-gp" else {}
    assert_as_new(loss, real, fake, **given)


def test_options_of_other_types_are_read_in_each_step() -> None:
    loss = settled()
    loss.penalty_weight = weight = torch.tensor(3.0)
    for value in (3.0, 3.0, 5.0):
        weight.fill_(value)
        real, fake, eps = batch(N, WIDTH)
        parts = loss(real, fake, eps=eps)
        torch.testing.assert_close(parts.loss, parts.adversarial + value * parts.penalty)


def test_the_count_of_lazy_penalties_goes_on() -> None:
    loss = settled()
    loss.penalty_every = 2
    found = [float(loss(*batch(N, WIDTH)[:2]).penalty) > 0 for _ in range(4)]
    assert found == [True, False, True, False]
    assert loss.calls == 4


@pytest.mark.parametrize("what", ["samples", "positional", "keyword", "penalty", "size", "grad", "device"])
def test_other_arguments_are_heeded(what: str) -> None:
    loss = settled()
    real, fake, eps = batch(6 if what == "size" else N, WIDTH)
    options = {
        "positional": {"critic_args": (0.5,)},
        "keyword": {"critic_kwargs": {"shift": 0.5}},
        "penalty": {"with_penalty": False},
    }.get(what, {})
    if what == "samples":
        real.requires_grad_()
        ours = loss(real, fake, eps=eps).loss
        exact = plain_loss(lambda x: loss.critic(x)[0], real, fake, eps)
        assert_same(gradients(ours, loss.critic, real), gradients(exact, loss.critic, real))
    elif what == "device":
        with pytest.raises(ValueError, match="fake: expected the device of real, meta, got cpu"):
            loss(real.to("meta"), fake, eps=eps)
    else:
        with torch.set_grad_enabled(what != "grad"):
            assert_as_new(loss, real, fake, eps=eps, **options)


@pytest.mark.parametrize("mode", ["training", "autocast", "dtype", "backend", "double backward", "dual level"])
def test_other_modes_are_heeded(mode: str) -> None:
    loss = settled()
    real, fake, eps = batch(N, WIDTH)
    if mode == "training":
        loss.train()
        parts = [loss(real, fake, eps=eps).loss for _ in range(4)]
        assert len({float(part.detach()) for part in parts}) == 4  # a mask for each
    elif mode == "autocast":
        loss.float()
        given = [x.float() for x in (real, fake, eps)]
        found = []
        for enabled in (False, False, False, True, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert_as_new(loss, *given[:2], eps=given[2], tolerance=3e-2 if enabled else 1e-5)
                found.append(float(loss(*given[:2], eps=given[2]).penalty))
        assert found[2] == pytest.approx(found[5], rel=1e-5)
        assert found[2] != pytest.approx(found[4], rel=1e-5)
    elif mode == "dtype":
        loss.float()
        assert loss(real.float(), fake.float(), eps=eps.float()).loss.dtype == torch.float32
    elif mode == "backend":
        with gpk.backend("reference"):
            assert_as_new(loss, real, fake, eps=eps)
    elif mode == "double backward":
        with gpk.fast_double_backward():
            value = loss(real, fake, eps=eps).loss
            (first,) = torch.autograd.grad(value, [loss.critic.top.weight], create_graph=True)
            assert first.requires_grad
    else:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(real, torch.ones_like(real))
            with pytest.raises(RuntimeError, match="forward-mode tangent"):
                loss(dual, fake, eps=eps)


def test_without_the_loop_in_cpp_steps_are_made_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = settled()
    monkeypatch.setattr(backends, "program", None)
    real, fake, eps = batch(N, WIDTH)
    assert len(functions_called(lambda: loss(real, fake, eps=eps))) > 20
    assert_as_new(loss, real, fake, eps=eps)


def test_another_critic_may_take_its_place() -> None:
    loss = settled()
    loss.critic = mlp(WIDTH, 8, 1).double()
    real, fake, eps = batch(N, WIDTH)
    for _ in range(4):
        ours = loss(real, fake, eps=eps).loss
        exact = plain_loss(loss.critic, real, fake, eps)
        torch.testing.assert_close(ours, exact)
        assert_same(gradients(ours, loss.critic), gradients(exact, loss.critic))


def test_lazy_penalties_by_name_are_left_out() -> None:
    torch.manual_seed(0)
    loss = gpk.CriticLoss(Scored().double().eval(), penalty={"wgan-gp": 3.0}, penalty_every=3)
    names = []
    for _ in range(7):
        real, fake, eps = batch(N, WIDTH)
        parts = loss(real, fake, eps=eps)
        names.append(list(parts.penalty))
        exact = plain_loss(lambda x: loss.critic(x)[0], real, fake, eps, weight=9.0 if parts.penalty else 0.0)
        assert_same(gradients(parts.loss, loss.critic), gradients(exact, loss.critic))
    assert names == [["wgan-gp"], [], []] * 2 + [["wgan-gp"]]
