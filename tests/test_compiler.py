"""`torch.compile(backend="gpkernels")`: recording and replay of a graph's calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import gpkernels as gpk
from comparing import assert_exactly_as, assert_same, batch, gradients
from counting import Count
from critics import mlp, plain_loss
from gpkernels.bench.small import SMALL
from gpkernels.compiler import as_program

CRITICS = (
    "tanh, N 2", "ReLU .view(-1), N 2", "LayerNorm, N 64", "dropout, N 64", "DCGAN BatchNorm, N 2",
    "DCGAN spectral norm, N 2", "residual GroupNorm, N 2", "StyleGAN2, N 4", "R3GAN, N 2", "attention, N 4",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("compiler_anew")


class Counted:
    """The backend, and how often a graph of Dynamo's was made and run as it is."""

    def __init__(self) -> None:
        self.made = self.run = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.made += 1

        def counted(*given: Any) -> Any:
            self.run += 1
            return graph(*given)

        return as_program(counted, inputs)


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Counted]:
    counted = Counted()
    return torch.compile(function, backend=counted, fullgraph=True, **options), counted


def test_torch_finds_it_by_its_name() -> None:
    (found,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "gpkernels"]
    assert found.load() is as_program
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.compile(lambda x: x.exp().sum(), backend="gpkernels")(x), x)
    torch.testing.assert_close(gradient, x.exp().detach())


@pytest.mark.parametrize("name", CRITICS)
def test_a_step_of_a_critic(name: str) -> None:
    case = SMALL[name]
    critic = case.make().double()
    twin = copy.deepcopy(critic)
    loss = gpk.CriticLoss(critic, together=False if "dropout" in name else None)  # one batch would draw one mask
    step, counted = compiled(lambda r, f, e: loss(r, f, eps=e).loss)
    for turn in range(3):
        real, fake, eps = batch(*case.shape)
        torch.manual_seed(turn)
        exact = plain_loss(twin, real, fake, eps)
        torch.manual_seed(turn)
        ours = step(real, fake, eps)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
        assert_same(gradients(ours, critic), gradients(exact, twin))
        for a, b in zip(critic.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert (counted.made, counted.run) == (1, 1)


@pytest.mark.parametrize("dynamic", [None, True])
def test_every_batch_size_has_its_list(dynamic: bool | None) -> None:
    critic = mlp(6, 16, 1).double()
    step, counted = compiled(lambda r, f, e: gpk.gradient_penalty(critic, r, f, eps=e), dynamic=dynamic)
    for n in (4, 5, 7, 4, 5, 7, 64):
        real, fake, eps = batch(n, 6)
        exact = gpk.gradient_penalty(critic, real, fake, eps=eps)
        assert_same(gradients(step(real, fake, eps), critic), gradients(exact, critic))
    assert counted.made <= 2
    assert counted.run <= 5


# --- any step ---------------------------------------------------------------------------------------------------------


def several(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    h = net(x)
    return h.square().mean(), h.detach() * 2, (h[:, :1] * x).sum(1), torch.ones(3, dtype=torch.float64)


def test_outputs_of_all_kinds_and_gradients_of_inputs() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 6)).double()
    step, counted = compiled(lambda x: several(net, x))
    for _ in range(3):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        ours, exact = step(x.sin()), several(net, x.sin())
        assert [y.requires_grad for y in ours] == [y.requires_grad for y in exact]
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b)
        total = [f[0] + f[2].sum() for f in (step(x), several(net, x))]
        assert_exactly_as(*total, net, inputs=(x,))
    assert counted.run == counted.made


def test_cotangents_of_any_strides() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()
    step, counted = compiled(lambda x: net(x).reshape(8, 3))
    for _ in range(3):
        x, weight = torch.randn(4, 6).double(), torch.randn(3, 8).double()
        ours, exact = [(weight * f(x).t().contiguous()).sum() for f in (step, lambda x: net(x).reshape(8, 3))]
        assert_exactly_as(ours, exact, net)
    assert counted.run == counted.made


def test_buffers_are_written_and_their_versions_raised() -> None:
    total = torch.zeros(3)

    def step(x: Tensor) -> Tensor:
        total.add_(x.detach())
        return (x * 2).sum()

    call, counted = compiled(step)
    for turn in range(1, 4):
        before = total._version
        call(torch.ones(3, requires_grad=True)).backward()
        assert total.tolist() == [turn] * 3
        assert total._version > before
    assert counted.run == 1


def test_masks_are_drawn_anew() -> None:
    call, counted = compiled(lambda x: F.dropout(x, 0.5) + torch.rand(100))
    x = torch.ones(100)
    found = [call(x) for _ in range(4)]
    assert all(not torch.equal(a, b) for a, b in pairwise(found))
    torch.manual_seed(3)
    ours = call(x)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, F.dropout(x, 0.5) + torch.rand(100))
    assert counted.run == 1


@pytest.mark.parametrize("function", [lambda x: x.view(-1), lambda x: x[1:], lambda x: (lambda y: (y, y[1:]))(x * 2)])
def test_views_are_left_as_they_are(function: Callable[[Tensor], Any]) -> None:
    call, counted = compiled(function)
    x = torch.randn(3, 4)
    for turn in range(3):
        ours, exact = call(x), function(x)
        for a, b in zip(*((y,) if isinstance(y, Tensor) else y for y in (ours, exact)), strict=True):
            torch.testing.assert_close(a, b)
        if isinstance(ours, Tensor):
            assert ours.data_ptr() == exact.data_ptr()
        assert counted.run == turn + 1


def test_no_gradients_without_grad_mode() -> None:
    net = nn.Linear(3, 2)
    call, _ = compiled(lambda x: net(x).sum())
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert not any(call(x).requires_grad for _ in range(3))
    assert all(call(x).requires_grad for _ in range(3))


def test_a_dispatch_mode_sees_every_call() -> None:
    call = torch.compile(lambda x: (x @ x).sum(), backend=as_program)
    x = torch.ones(4, 4, requires_grad=True)
    call(x)
    call(x)
    with Count() as count:
        call(x)
    assert count.flops == 2 * 4**3


@pytest.mark.parametrize("kind", ["general", "delivered"])
def test_backward_twice(kind: str) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    weight = critic[0].weight
    x = torch.randn(4, 6, dtype=torch.float64)
    function = (lambda x: critic(x).square().mean()) if kind == "general" else (lambda x: gpk.r1_penalty(critic, x))
    call, counted = compiled(function)
    for turn in range(3):
        loss = call(x)
        first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        twice = torch.autograd.grad(loss, weight, torch.full_like(loss, 2.0))[0]
        torch.testing.assert_close(twice, 2 * first)
        if turn:
            with pytest.raises(RuntimeError, match="second time"):
                torch.autograd.grad(loss, weight)
            loss = call(x)
            with pytest.raises(RuntimeError):
                torch.autograd.grad(torch.autograd.grad(loss, weight, create_graph=True)[0].sum(), weight)
    assert counted.run == 1


def test_a_penalty_by_hand_on_a_compiled_critic_is_refused() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    call, counted = compiled(critic)
    for _ in range(3):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match=r'"gpkernels" does not support double backward \(create_graph=True\)'):
            torch.autograd.grad(call(x).sum(), x, create_graph=True)
    assert counted.run == 1


@pytest.mark.parametrize("trains", [True, False])
def test_forward_mode_tangents_are_those_of_the_function(trains: bool) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double().requires_grad_(trains)
    call, _ = compiled(critic)
    x, direction = torch.randn(2, 4, 6, dtype=torch.float64)
    for _ in range(3):
        call(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, direction)
            ours, exact = (forward_ad.unpack_dual(function(dual)).tangent for function in (call, critic))
        torch.testing.assert_close(ours, exact)


def test_a_weight_that_is_changed_before_the_backward_pass() -> None:
    weight = torch.randn(3, requires_grad=True)
    call, _ = compiled(lambda x: (x * weight).exp().sum())
    x = torch.randn(3, requires_grad=True)
    call(x)
    loss = call(x)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_weights_run_once() -> None:
    weight, seen = torch.ones(3, requires_grad=True), []
    weight.register_hook(lambda g: (seen.append(1), g * 10)[1])
    call, _ = compiled(lambda x: (x * weight).square().sum())
    x = torch.arange(3.0)
    for turn in range(1, 4):
        (gradient,) = torch.autograd.grad(call(x), weight)
        torch.testing.assert_close(gradient, 20 * x.square())
        assert len(seen) == turn


def test_a_tensor_subclass_runs_as_it_is() -> None:
    class Own(Tensor):
        pass

    x = torch.ones(3).as_subclass(Own)
    torch.testing.assert_close(as_program(lambda x: (x * 2,), [x])(x)[0], torch.full((3,), 2.0).as_subclass(Own))


@pytest.mark.parametrize("write", [lambda x: x.mul_(3), lambda x: F.relu(x, inplace=True), lambda x: x.__imul__(2)])
def test_an_activation_that_is_written_to(write: Callable[[Tensor], Tensor]) -> None:
    def step(x: Tensor) -> Tensor:
        return (write(x) * 2).sum()

    call, leaf = torch.compile(step, backend=as_program), torch.ones(3, requires_grad=True)
    for _ in range(3):
        ours, exact = leaf * 1, leaf * 1
        found = [torch.autograd.grad(f(x) + x.sum(), leaf)[0] for f, x in ((call, ours), (step, exact))]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(ours, exact)


def test_complex_numbers_run_as_they_are() -> None:
    weight, x = torch.randn(6, 5, requires_grad=True), torch.randn(4, 6)
    function = lambda x: torch.fft.rfft((x @ weight).tanh(), dim=1).abs().sum()  # noqa: E731
    call, counted = compiled(function)
    for turn in range(3):
        ours, exact = call(x), function(x)
        torch.testing.assert_close(ours, exact)
        torch.testing.assert_close(*(torch.autograd.grad(loss, weight) for loss in (ours, exact)))
        assert counted.run == turn + 1


def _transposed(y: Tensor) -> tuple[Tensor, ...]:
    first = y.t() * 1
    y.t_()
    return first, y.t() * 1


def _unsqueezed(y: Tensor) -> tuple[Tensor, ...]:
    y.detach().unsqueeze_(0)
    return y.sum(0), y[0] * 1


def _set(y: Tensor) -> tuple[Tensor, ...]:
    other = y * 1
    other.set_(y)  # type: ignore[call-overload]
    y.mul_(3)
    return (other * 1,)


@pytest.mark.parametrize("change", [_transposed, _unsqueezed, _set])
def test_a_change_of_geometry_in_place_runs_as_it_is(change: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    step, counted = compiled(lambda x: change(x * 2))
    x = torch.randn(4, 3)
    for turn in range(3):
        for got, expected in zip(step(x), change(x * 2), strict=True):
            assert torch.equal(got, expected)
        assert counted.run == turn + 1


def test_values_that_are_read_back_are_not_frozen() -> None:
    run = as_program(lambda x: (x * x.sum().item(),), [torch.ones(3)])
    for factor in (1.0, 2.0, 3.0):
        x = torch.full((3,), factor)
        torch.testing.assert_close(run(x)[0], x * 3 * factor)


def test_a_step_with_its_generator_and_an_update() -> None:
    torch.manual_seed(0)
    critic, generator = mlp(4, 16, 1).double(), nn.Linear(2, 4).double()
    twins = copy.deepcopy((critic, generator))
    loss = gpk.CriticLoss(critic)
    adams = [torch.optim.Adam(c.parameters()) for c in (critic, twins[0])]

    def ours(real: Tensor, z: Tensor, eps: Tensor) -> Tensor:
        return loss(real, generator(z).detach(), eps=eps).loss

    def plain(real: Tensor, z: Tensor, eps: Tensor) -> Tensor:
        return plain_loss(twins[0], real, twins[1](z).detach(), eps)

    step, counted = compiled(ours)
    for _ in range(4):
        real, z, eps = torch.randn(8, 4).double(), torch.randn(8, 2).double(), torch.rand(8).double()
        for adam, value in zip(adams, (step, plain), strict=True):
            adam.zero_grad()
            value(real, z, eps).backward()
            adam.step()
    assert_same(list(critic.parameters()), list(twins[0].parameters()))
    assert counted.run == 1
