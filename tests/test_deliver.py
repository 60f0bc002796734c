"""Values with precomputed gradients: the node in C++, and in Python where that does not apply."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import gpkernels as gpk
from comparing import batch
from critics import mlp
from gpkernels import backends
from gpkernels.critic.deliver import deliver
from watchers import PassesFunctions, PassesOps

needs_cpp = pytest.mark.skipif(backends.deliver is backends.declined, reason="the fast path is not built")
WAYS = ["the node in Python", pytest.param("the node in C++", marks=needs_cpp)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "the node in Python":
        monkeypatch.setattr(backends, "deliver", backends.declined)
    name: str = request.param
    return name


def delivered(**options: Any) -> tuple[Tensor, list[nn.Parameter], list[Tensor]]:
    """Return a value, two weights, and gradients for them without other references."""
    weights = [nn.Parameter(torch.randn(3, 2, **options)), nn.Parameter(torch.randn(4, **options))]
    gradients = [torch.randn_like(w) for w in weights]
    copies = [g.clone() for g in gradients]
    return deliver(torch.tensor(2.5, **options), list(zip(weights, gradients, strict=True))), weights, copies


def gradient_of(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def test_the_way_is_the_one_that_is_asked_for(way: str) -> None:
    value, _, _ = delivered()
    assert type(value.grad_fn).__name__ == ("CppFunction" if way == "the node in C++" else "_DeliverBackward")
    assert value.item() == 2.5
    assert value.requires_grad


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_scaled_by_the_cotangent(way: str, scale: float, dtype: torch.dtype) -> None:
    value, weights, gradients = delivered(dtype=dtype)
    (value * scale).backward()
    for w, g in zip(weights, gradients, strict=True):
        assert torch.equal(gradient_of(w), g * scale)


def test_a_kept_graph_gives_its_gradients_again(way: str) -> None:
    value, weights, gradients = delivered()
    value.backward(retain_graph=True)
    gradient_of(weights[0]).mul_(7)  # the user's own from now on
    first = torch.autograd.grad(value, weights, retain_graph=True)
    first[1].zero_()
    (value * 3).backward()
    assert torch.equal(gradient_of(weights[0]), 7 * gradients[0] + 3 * gradients[0])
    assert torch.equal(gradient_of(weights[1]), gradients[1] + 3 * gradients[1])


def test_a_second_backward_says_what_is_missing(way: str) -> None:
    value, _, _ = delivered()
    value.backward()
    with pytest.raises(RuntimeError, match="second time: expected retain_graph=True in the first"):
        value.backward()


def test_a_second_derivative_says_where_there_is_one(way: str) -> None:
    value, weights, _ = delivered()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; call it inside"):
        torch.autograd.grad(value, weights, create_graph=True)


def test_weights_take_the_gradients_without_a_copy(way: str) -> None:
    weight = nn.Parameter(torch.randn(5))
    gradient = torch.randn(5)
    place = gradient.data_ptr()
    value = deliver(torch.tensor(0.0), [(weight, gradient)])
    del gradient
    value.backward()
    assert gradient_of(weight).data_ptr() == place


def test_gradients_die_with_the_graph(way: str) -> None:
    weight, gradient = nn.Parameter(torch.randn(5)), torch.randn(5)
    alive = weakref.ref(gradient)
    value = deliver(torch.tensor(0.0), [(weight, gradient)])
    del gradient
    gc.collect()
    assert alive() is not None
    del value
    gc.collect()
    assert alive() is None


def test_batched_cotangents_give_a_batch_of_gradients(way: str) -> None:
    value, weights, gradients = delivered()
    cotangents = torch.tensor([1.0, 2.0, -3.0])
    found = torch.autograd.grad(value, weights, cotangents, is_grads_batched=True)
    for got, g in zip(found, gradients, strict=True):
        assert torch.equal(got, torch.stack([g * c for c in cotangents]))
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_hooks_on_saved_tensors_see_no_gradients(way: str) -> None:
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        value, weights, gradients = delivered()
        value.backward()
    assert not seen
    assert torch.equal(gradient_of(weights[0]), gradients[0])


def test_part_of_the_weights_may_be_asked_for(way: str) -> None:
    value, weights, gradients = delivered()
    (found,) = torch.autograd.grad(value, weights[1:])
    assert torch.equal(found, gradients[1])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_compiled_autograd_takes_the_whole_loss_and_changes_nothing_of_it(way: str, scale: float) -> None:
    critic = mlp(6, 8, 1)
    real, fake, eps = batch(5, 6, dtype=torch.float32)
    module = gpk.CriticLoss(critic)
    module(real, fake, eps=eps).loss.backward()
    plain = [p.grad.clone() for p in critic.parameters()]
    for _ in range(2):  # traced, then from the cache with other gradients
        critic.zero_grad()
        loss = scale * module(real, fake, eps=eps).loss
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            loss.backward(retain_graph=True)
        for p, g in zip(critic.parameters(), plain, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, scale * g)
            p.grad.mul_(3)
        loss.backward()
        for p, g in zip(critic.parameters(), plain, strict=True):
            torch.testing.assert_close(p.grad, 4 * scale * g)


def test_a_backward_in_a_mode_that_watches_is_like_any_other(way: str) -> None:
    value, weights, gradients = delivered()
    with PassesOps():
        (value * 2).backward()
    assert torch.equal(gradient_of(weights[0]), 2 * gradients[0])
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


class Own(Tensor):
    pass


@needs_cpp
@pytest.mark.parametrize("mode", [PassesFunctions, PassesOps, FakeTensorMode, torch.no_grad, torch.inference_mode])
def test_the_node_in_cpp_is_not_for_what_is_watched(mode: Any) -> None:
    weight = nn.Parameter(torch.randn(5))
    arguments = torch.tensor(0.0), [torch.randn(5)], [weight]
    assert backends.deliver(*arguments) is not NotImplemented
    with mode():
        assert backends.deliver(*arguments) is NotImplemented


@needs_cpp
@pytest.mark.parametrize("odd", ["subclass", "tangent", "transform", "count", "tuple", "no tensor"])
def test_the_node_in_cpp_is_not_for_odd_tensors(odd: str) -> None:
    value, gradients, tensors = torch.tensor(0.0), [torch.randn(5)], [torch.randn(5, requires_grad=True)]
    with forward_ad.dual_level() if odd == "tangent" else nullcontext():
        if odd == "transform":
            answers: list[bool] = []

            def asked(x: Tensor) -> Tensor:
                answers.append(backends.deliver(value, gradients, [x]) is NotImplemented)
                return x.sum()

            torch.func.grad(asked)(torch.randn(5))
            assert answers == [True]
            return
        given: dict[str, tuple[Any, Any, Any]] = {
            "subclass": (value, gradients, [torch.randn(5).as_subclass(Own).requires_grad_()]),
            "tangent": (value, gradients, tensors),
            "count": (value, gradients, tensors * 2),
            "tuple": (value, tuple(gradients), tensors),
            "no tensor": (value, [1.0], tensors),
        }
        if odd == "tangent":
            given[odd] = forward_ad.make_dual(value, torch.tensor(1.0)), gradients, tensors
        assert backends.deliver(*given[odd]) is NotImplemented


def test_gradients_are_handed_over_without_a_copy(way: str) -> None:
    critic = mlp(6, 8, 1)
    real, fake, eps = batch(5, 6, dtype=torch.float32)
    loss = gpk.CriticLoss(critic)(real, fake, eps=eps).loss
    with profile() as seen:
        loss.backward()
    names = {event.name for event in seen.events()}
    assert "aten::detach" in names  # as autograd does to a gradient that it does not copy
    assert not names & {"aten::clone", "aten::copy_", "aten::mul", "aten::_foreach_mul", "aten::_foreach_mul_"}


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_trace_of_the_backward_pass_scales_by_its_own_cotangent(way: str, mode: str) -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    weights = list(critic.parameters())

    def gradients(x: Tensor, factor: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(gpk.r1_penalty(critic, x), weights, factor, allow_unused=True)
        return [g for g in found if g is not None]

    x = torch.randn(5, 3)
    traced = make_fx(gradients, tracing_mode=mode, _allow_non_fake_inputs=mode == "fake")(x, torch.tensor(1.0))
    for factor in (1.0, -2.0):
        other, cotangent = torch.randn(5, 3), torch.tensor(factor)
        for a, b in zip(traced(other, cotangent), gradients(other, cotangent), strict=True):
            torch.testing.assert_close(a, b)


def test_a_mode_around_the_backward_pass_alone_may_write_it_down(way: str) -> None:
    value, weights, gradients = delivered()
    traced = make_fx(lambda c: torch.autograd.grad(value, weights, c, retain_graph=True))(torch.tensor(1.0))
    for got, g in zip(traced(torch.tensor(3.0)), gradients, strict=True):
        torch.testing.assert_close(got, 3 * g)
    traced = make_fx(lambda c: torch.autograd.grad(value, weights, c))(torch.tensor(1.0))
    assert "_local_scalar_dense" not in traced.code


@pytest.mark.parametrize(
    "loss",
    [
        lambda critic, x: gpk.r1_penalty(critic, x),
        lambda critic, x: gpk.r1_penalty(critic, x, reduction="none").sum(),
        lambda critic, x: gpk.input_gradient(critic, x).pow(3).sum(),
        lambda critic, x: gpk.CriticLoss(critic, penalty="r1")(x, 2 * x).loss,
    ],
    ids=["penalty", "penalty of each sample", "input gradient", "step"],
)
def test_symbols_for_sizes_are_refused_where_there_is_no_compiler(loss: Callable[..., Tensor]) -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(critic, x), critic[0].weight)

    with pytest.raises(RuntimeError, match="cannot be traced with symbols for sizes"):
        make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(5, 3))
