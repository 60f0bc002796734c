"""First derivatives of ops as C++ nodes: those of the Functions, to the bit, and what a node of autograd has to do."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import gpkernels as gpk
from gpkernels import backends
from gpkernels.ops import ALL
from gpkernels.ops.interpolate import interpolate_op

pytestmark = pytest.mark.skipif(backends.direct is None, reason="the fast paths are not built")

Pair = tuple[Tensor, Tensor]
EPS = torch.linspace(0.1, 0.9, 6)
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "interpolate": lambda x, y: gpk.interpolate(x, y, EPS),
    "interpolate, real alone": lambda x, y: gpk.interpolate(x, y.detach(), EPS),
    "interpolate, fake alone": lambda x, y: gpk.interpolate(x.detach(), y, EPS),
    "gradient_norm_penalty": lambda x, y: gpk.gradient_norm_penalty(x),
    "gradient_norm_penalty, each": lambda x, y: gpk.gradient_norm_penalty(
        x, 0.5, one_sided=True, reduction="none", power=3.0
    ),
    "consistency_term": lambda x, y: gpk.consistency_term(x, y, 2 * x, y.square()),
    "consistency_term, scores alone": lambda x, y: gpk.consistency_term(x, y, x.detach(), y.detach()),
    "lipschitz_consistency": lambda x, y: gpk.lipschitz_consistency(x, y, 2 * x, y.square()),
    "wgan_generator_loss": lambda x, y: gpk.wgan_generator_loss(x),
    "gan_discriminator_loss": gpk.gan_discriminator_loss,
    "least_squares_critic_loss": lambda x, y: gpk.least_squares_critic_loss(x, y, real_target=0.9, fake_target=-1.0),
    "relativistic_critic_loss": gpk.relativistic_critic_loss,
    "add_instance_noise": lambda x, y: gpk.add_instance_noise(x, 0.3),
}


def leaves(dtype: torch.dtype = torch.float32) -> Pair:
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 5, generator=random).to(dtype).requires_grad_() for _ in range(2))
    return x, y


def derivatives(call: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, graph: bool) -> list[Tensor | None]:
    """Return the value, its gradients, and with a graph the gradients of a function of those."""
    torch.manual_seed(1)
    x, y = leaves(dtype)
    value = call(x, y)
    cotangent = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape).requires_grad_(graph)
    first = torch.autograd.grad(value, (x, y), cotangent, allow_unused=True, create_graph=graph)
    second: tuple[Tensor | None, ...] = ()
    if graph:
        total = sum(g.sin().sum() for g in first if g is not None)
        second = torch.autograd.grad(total, (x, y, cotangent), allow_unused=True)
    return [value, *first, *second]


@pytest.fixture
def functions_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that takes the nodes away."""

    def take_away() -> None:
        for op in ALL.values():
            monkeypatch.setattr(op, "recorded", backends.declined)

    return take_away


@pytest.mark.parametrize("graph", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_derivatives_are_those_of_the_functions(
    name: str, dtype: torch.dtype, graph: bool, functions_alone: Callable[[], None]
) -> None:
    own = derivatives(CALLS[name], dtype, graph)
    functions_alone()
    expected = derivatives(CALLS[name], dtype, graph)
    for got, wanted in zip(own, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_the_node_is_not_pythons(name: str) -> None:
    node = CALLS[name](*leaves()).grad_fn
    assert node is not None
    assert not isinstance(node, torch.autograd.function.BackwardCFunction)
    assert node.name().endswith(("Backward", "AddBackward0"))


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensors_pass_through_hooks(name: str) -> None:
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    x, y = leaves()
    with saved_tensors_hooks(pack, lambda x: x):
        value = CALLS[name](x, y)
    assert bool(packed) == (name != "add_instance_noise")
    got = torch.autograd.grad(value.sum(), (x, y), allow_unused=True)
    expected = torch.autograd.grad(CALLS[name](x, y).sum(), (x, y), allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert g is e is None or torch.equal(g, e)


def test_a_graph_is_freed_by_its_backward_unless_it_is_retained() -> None:
    x, y = leaves()
    value = gpk.wgan_critic_loss(x, y)
    torch.autograd.grad(value, (x, y), retain_graph=True)
    torch.autograd.grad(value, (x, y))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, (x, y))


def test_a_change_in_place_of_what_was_saved_raises() -> None:
    x, _ = leaves()
    grad = x * 2
    value = gpk.gradient_norm_penalty(grad)
    grad.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_samples_that_the_derivative_does_not_read_are_not_kept() -> None:
    x, y = leaves()
    real = x * 1.5
    mixed = gpk.interpolate(real, y, EPS)
    gone = weakref.ref(real)
    del real
    assert gone() is None
    assert mixed.requires_grad


def test_only_gradients_that_are_asked_for_are_computed() -> None:
    x, y = leaves()
    mixed = gpk.interpolate(x, y, EPS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        (to_x,) = torch.autograd.grad(mixed.sum(), x)
    events = [event for event in profile.events() if event.key == "gpkernels::interpolate_backward"]
    assert [event.concrete_inputs[2:] for event in events] == [[True, False]]
    assert torch.equal(to_x, EPS[:, None].expand(6, 5))


def test_an_undefined_cotangent_gives_no_gradient() -> None:
    x, y = leaves()
    mixed = gpk.interpolate(x, y, EPS)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> None:
            return None

    out: Tensor = Nothing.apply(mixed)  # type: ignore[no-untyped-call]
    assert torch.autograd.grad(out.sum(), (x, y), allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", CALLS)
def test_batched_cotangents(name: str) -> None:
    x, y = leaves()
    value = CALLS[name](x, y)
    cotangents = torch.stack([torch.full_like(value, k) for k in (1.0, -2.0, 0.5)])
    batched = torch.autograd.grad(
        value, (x, y), cotangents, allow_unused=True, is_grads_batched=True, retain_graph=True
    )
    for i, cotangent in enumerate(cotangents):
        one = torch.autograd.grad(value, (x, y), cotangent, allow_unused=True, retain_graph=True)
        for got, expected in zip(batched, one, strict=True):
            assert got is expected is None or torch.allclose(got[i], expected)


def test_a_tangent_of_the_cotangent_is_kept() -> None:
    x, y = leaves()
    mixed = gpk.interpolate(x, y, EPS)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones(6, 5), torch.full((6, 5), 3.0))
        (to_x,) = torch.autograd.grad(mixed, x, cotangent)
        tangent = forward_ad.unpack_dual(to_x).tangent
    assert torch.equal(tangent, 3.0 * EPS[:, None].expand(6, 5))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd(name: str) -> None:
    x, y = leaves()

    def gradients(compiled: bool) -> list[Tensor | None]:
        x.grad = y.grad = None
        torch.manual_seed(0)
        value = CALLS[name](x, y).sum()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
                value.backward()
        else:
            value.backward()
        return [x.grad, y.grad]

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert got is expected is None or torch.equal(got, expected)


@pytest.mark.parametrize("how", ["of the thread", "of the process"])
def test_a_backward_pass_runs_on_the_backend_of_its_time(how: str) -> None:
    x, y = leaves()
    loss = gpk.gan_discriminator_loss(x, y)
    op, called = ALL["score_loss_backward"], []
    implementation = op.implementation
    op.implementation = lambda *args: called.append(1) or implementation(*args)
    try:
        if how == "of the thread":
            with gpk.backend("reference"):
                torch.autograd.grad(loss, (x, y), retain_graph=True)
        else:
            gpk.set_backend("reference")
            torch.autograd.grad(loss, (x, y), retain_graph=True)
            gpk.set_backend("auto")
        assert called == [1]
        torch.autograd.grad(loss, (x, y))
        assert called == [1]
    finally:
        gpk.set_backend("auto")
        op.implementation = implementation


def test_an_eps_with_a_graph_is_left_to_pytorch_and_one_of_another_dtype_is_not() -> None:
    x, y = leaves()
    assert interpolate_op.recorded(x, y, EPS.clone().requires_grad_()) is NotImplemented
    half = x.bfloat16(), y.bfloat16()
    assert interpolate_op.recorded(*half, EPS) is not NotImplemented
    assert interpolate_op.direct(*(h.detach() for h in half), EPS) is NotImplemented


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in _GradientNormPenaltyBackward")
def test_anomaly_mode_names_the_node() -> None:
    with torch.autograd.set_detect_anomaly(True):
        penalty = gpk.gradient_norm_penalty(torch.zeros(2, 2, requires_grad=True))
        with pytest.raises(RuntimeError, match="'_GradientNormPenaltyBackward' returned nan"):
            (penalty * torch.inf).backward()


def test_an_error_of_a_hook_on_saved_tensors_is_the_users() -> None:
    def pack(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with saved_tensors_hooks(pack, lambda x: x), pytest.raises(KeyError, match="mine"):
        gpk.gradient_norm_penalty(leaves()[0])


@pytest.mark.parametrize("retained", [True, False], ids=["a retained graph", "a graph that one of them frees"])
@pytest.mark.parametrize("name", CALLS)
def test_backward_passes_in_several_threads_over(name: str, retained: bool) -> None:
    torch.manual_seed(0)
    x, y = leaves()
    value = CALLS[name](x, y).sum()
    expected = torch.autograd.grad(value, (x, y), allow_unused=True, retain_graph=True)
    start, found, errors = threading.Barrier(4), [], []

    def backward() -> None:
        start.wait()
        for _ in range(10):
            try:
                found.append(torch.autograd.grad(value, (x, y), allow_unused=True, retain_graph=retained))
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=backward) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) + len(errors) == 40
    assert all("a second time" in error and not retained for error in errors)
    for gradients in found:
        for got, wanted in zip(gradients, expected, strict=True):
            assert got is wanted is None or torch.equal(got, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_saved_does_not_depend_on_the_backend(name: str) -> None:
    """A checkpoint refuses a forward pass that saves other tensors when it is run again."""

    def saved(backend: str) -> list[torch.Size]:
        shapes: list[torch.Size] = []

        def pack(x: Tensor) -> Tensor:
            shapes.append(x.shape)
            return x

        with saved_tensors_hooks(pack, lambda x: x), gpk.backend(backend):
            CALLS[name](*leaves())
        return shapes

    assert saved("auto") == saved("reference")


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_alive_when_a_graph_is_dropped(name: str) -> None:
    x, y = leaves()
    gone: list[weakref.ref[Tensor]] = []

    def pack(x: Tensor) -> Tensor:
        copy = x.detach().clone()
        gone.append(weakref.ref(copy))
        return copy

    with saved_tensors_hooks(pack, lambda x: x):
        dropped = CALLS[name](x, y).sum()
        retained = CALLS[name](x, y).sum()
        freed = CALLS[name](x, y).sum()
    retained.backward(retain_graph=True)
    freed.backward()
    del dropped, retained
    assert all(of() is None for of in gone)


def test_compiled_autograd_is_right_for_other_constants_and_sizes() -> None:
    made: list[int] = []

    def counted(graph: Any) -> Any:
        made.append(1)
        return graph

    for target, samples in [(0.0, 6), (0.5, 6), (1.5, 4), (1.5, 6)]:
        x = torch.linspace(-1, 1, samples * 5).view(samples, 5).requires_grad_()
        (expected,) = torch.autograd.grad(gpk.gradient_norm_penalty(x, target, power=3.0), x)
        with torch._dynamo.compiled_autograd._enable(counted):
            gpk.gradient_norm_penalty(x, target, power=3.0).backward()
        assert x.grad is not None
        assert torch.equal(x.grad, expected)
    assert len(made) <= 2  # the first, and one for any size
