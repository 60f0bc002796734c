"""`compile_passes`: eager critics whose passes Inductor compiles, with the numbers of those that it does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_exactly_as, batch
from critics import dcgan, mlp, plain_loss, plain_penalty, plain_points
from gpkernels import backends
from gpkernels.bench.small import SMALL
from gpkernels.critic import compiled, program, run
from test_critic_program import Changing


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """Nothing is known of any signature."""
    run.forget()
    yield
    assert compiled.chosen() is None


CRITICS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "tanh": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), (5, 6)),
    "DCGAN": (lambda: dcgan(3, 4, 16), (3, 3, 16, 16)),
    "residual, GroupNorm": (SMALL["residual GroupNorm, N 2"].make, SMALL["residual GroupNorm, N 2"].shape),
}


def made_by_compiler() -> list[bool]:
    """Whether each stretch of a program that is worth it is compiled."""
    found = [s.program for s in program.signatures._entries.values() if s.program is not None]
    stretches = [part for p in found for part in p.parts if isinstance(part, program.Stretch)]
    return [s.options is not None and s.native is not None for s in stretches if len(s.calls) >= program.WORTH]


@pytest.mark.parametrize("name", CRITICS)
def test_steps_and_penalties_are_those_of_plain_pytorch(name: str) -> None:
    make, shape = CRITICS[name]
    critic = make().double()
    loss = gpk.CriticLoss(critic, together=True)
    with gpk.compile_passes():
        for _ in range(4):
            real, fake, eps = batch(*shape)
            points = plain_points(real, fake, eps, "wgan-gp")
            assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)
            assert_exactly_as(gpk.gradient_penalty(critic, real, fake, eps=eps), plain_penalty(critic, points), critic)
    assert made_by_compiler() == [True, True]


def test_a_loop_of_python_runs_them_too(loop: str) -> None:
    critic = CRITICS["tanh"][0]().double()
    with gpk.compile_passes():
        for _ in range(4):
            real, fake, eps = batch(5, 6)
            points = plain_points(real, fake, eps, "wgan-gp")
            assert_exactly_as(gpk.gradient_penalty(critic, real, fake, eps=eps), plain_penalty(critic, points), critic)
    assert made_by_compiler() == [True]


def test_calls_without_a_rule_part_what_is_compiled() -> None:
    critic = Changing().double()
    with gpk.compile_passes():
        for _ in range(4):
            real, fake, eps = batch(5, 6)
            points = plain_points(real, fake, eps, "wgan-gp")
            ours, exact = gpk.gradient_penalty(critic, real, fake, eps=eps), plain_penalty(critic, points)
            torch.testing.assert_close(ours, exact)
            for p in critic.parameters():
                pair = [torch.autograd.grad(x, p, retain_graph=True, allow_unused=True)[0] for x in (ours, exact)]
                torch.testing.assert_close(*(torch.zeros_like(p) if g is None else g for g in pair))
    (one,) = [s.program for s in program.signatures._entries.values() if s.program is not None]
    assert len(one.parts) > 1
    assert made_by_compiler()
    assert all(made_by_compiler())


def settled(critic: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> gpk.CriticLossParts:
    real, fake, eps = inputs
    loss = gpk.CriticLoss(critic, together=True)
    with gpk.compile_passes():
        for _ in range(3):
            loss(real, fake, eps=eps)
        assert made_by_compiler()[-1]
        return loss(real, fake, eps=eps)


def test_the_graph_is_kept_where_it_is_asked_for() -> None:
    critic, inputs = CRITICS["tanh"][0]().double(), batch(5, 6)
    parts, weights = settled(critic, inputs), list(critic.parameters())
    exact = torch.autograd.grad(plain_loss(critic, *inputs), weights, allow_unused=True)
    for factor in (1.0, 3.0):
        cotangent = torch.full_like(parts.loss, factor)
        found = torch.autograd.grad(parts.loss, weights, cotangent, retain_graph=True, allow_unused=True)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, None if b is None else factor * b)
    torch.autograd.grad(parts.loss, weights)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(parts.loss, weights)


def test_results_may_be_changed_in_place() -> None:
    critic, inputs = CRITICS["DCGAN"][0]().double(), batch(3, 3, 16, 16)
    exact = gpk.CriticLoss(critic, together=True)(*inputs[:2], eps=inputs[2])
    parts = settled(critic, inputs)
    parts.loss.mul_(2)
    parts.penalty.zero_()
    parts.adversarial.add_(1)
    torch.testing.assert_close(parts.loss, 2 * exact.loss)
    torch.testing.assert_close(parts.adversarial, exact.adversarial + 1)
    weights = list(critic.parameters())
    pairs = list(zip(*(torch.autograd.grad(x, weights) for x in (parts.loss, exact.loss)), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, 2 * b)
        a.fill_(torch.nan)
    again = settled(critic, inputs)
    torch.testing.assert_close(again.loss, exact.loss)
    torch.testing.assert_close(again.penalty, exact.penalty)
    for a, (_, b) in zip(torch.autograd.grad(again.loss, weights), pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_only_those_who_ask_get_compiled_passes() -> None:
    critic, (real, fake, eps) = CRITICS["tanh"][0]().double(), batch(5, 6)

    def call() -> None:
        for _ in range(4):
            gpk.gradient_penalty(critic, real, fake, eps=eps)

    call()
    assert made_by_compiler() == [False]
    gpk.set_compile_passes()
    try:
        with gpk.compile_passes(False):
            call()
        assert made_by_compiler() == [False]
        call()
        assert made_by_compiler() == [False, True]
    finally:
        gpk.set_compile_passes(False)
    with gpk.compile_passes({"max_autotune": False}):
        call()
    assert made_by_compiler() == [False, True, True]
    call()
    assert made_by_compiler() == [False, True, True]


def test_a_choice_is_its_threads_own() -> None:
    found: list[Any] = []
    with gpk.compile_passes():
        thread = threading.Thread(target=lambda: found.append(compiled.chosen()))
        thread.start()
        thread.join()
        assert compiled.chosen() is not None
    assert found == [None]


def test_threads_may_share_what_is_compiled(loop: str) -> None:
    critic = CRITICS["tanh"][0]().double()
    errors: list[BaseException] = []

    def work(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        real, fake, eps = inputs
        try:
            with gpk.compile_passes():
                for _ in range(5):
                    points = plain_points(real, fake, eps, "wgan-gp")
                    ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
                    assert_exactly_as(ours, plain_penalty(critic, points), critic)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(batch(5, 6),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert made_by_compiler() == [True]


def test_a_compiler_that_fails_raises() -> None:
    critic, (real, fake, eps) = CRITICS["tanh"][0]().double(), batch(4, 6)
    with gpk.compile_passes({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        for _ in range(2):
            gpk.gradient_penalty(critic, real, fake, eps=eps)
        for _ in range(2):
            with pytest.raises(Exception, match="no-such-compiler"):
                gpk.gradient_penalty(critic, real, fake, eps=eps)


def test_bad_options_are_refused() -> None:
    for options, error, message in (
        ("fast", TypeError, "options: expected True, False or a mapping, got str"),
        (None, TypeError, "got NoneType"),
        ({"no_such_option": 1}, ValueError, "options: expected names of Inductor's options, got 'no_such_option'"),
    ):
        with pytest.raises(error, match=message):
            gpk.set_compile_passes(options)
        with pytest.raises(error, match=message), gpk.compile_passes(options):
            pass
    assert compiled.chosen() is None


def test_it_changes_nothing_inside_the_compiler() -> None:
    torch.compiler.reset()
    critic, (real, fake, eps) = mlp(6, 8, 1).double(), batch(5, 6)

    def step(r: Tensor, f: Tensor, e: Tensor) -> Tensor:
        with gpk.compile_passes():
            return gpk.gradient_penalty(critic, r, f, eps=e)

    ours = torch.compile(step, backend="aot_eager", fullgraph=True)(real, fake, eps)
    assert_exactly_as(ours, plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp")), critic)
    assert not made_by_compiler()


@pytest.mark.skipif(backends.program is None, reason="the loop in C++ is not built")
def test_a_settled_step_is_found_by_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    critic, (real, fake, eps) = CRITICS["tanh"][0]().double(), batch(5, 6)
    loss = gpk.CriticLoss(critic, together=True)
    with gpk.compile_passes():
        for _ in range(4):
            loss(real, fake, eps=eps)

        def gone(*_: Any, **__: Any) -> None:
            raise AssertionError("not in C++")

        monkeypatch.setattr("gpkernels.losses.critic_step", gone)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)
