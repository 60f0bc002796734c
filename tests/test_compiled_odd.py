"""Compiled steps of odd critics and in odd surroundings: PyTorch's numbers, or an error by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

import gpkernels as gpk
from comparing import assert_exactly_as, assert_same, batch, gradients
from counting import Count
from critics import TwoHeads, mlp, plain_loss, plain_penalty, plain_points
from gpkernels import backends
from gpkernels.bench.small import SMALL
from test_compiled_steps import compiled

pytestmark = pytest.mark.usefixtures("compiler_anew")


class Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return cotangent * (1 - y * y)


class Broken(nn.Module):
    """A critic that no compiler can trace in one go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        torch._dynamo.graph_break()
        return self.top(h * h)


class Own(nn.Module):
    """A custom function, a call without a rule, a weight that is computed, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = Squash.apply(F.linear(x, self.a.weight / self.a.weight.norm(), self.a.bias))
        h = torch.cumprod(1 + 0.1 * self.a(h), 1)
        return self.top(h).squeeze(1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_custom_functions_and_calls_without_a_rule(backend: str) -> None:
    critic = Own().double()
    real, fake, eps = batch(5, 6)
    ours = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss, backend)(real, fake, eps)
    assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


class Hooked(nn.Module):
    """A critic that registers a hook on the gradient of its batch, of an activation or of a computed weight."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.top, self.where = nn.Linear(6, 6), nn.Linear(6, 1), where

    def forward(self, x: Tensor) -> Tensor:
        h, weight = self.a(x).tanh(), self.top.weight * 1.5
        place = {"batch": x, "activation": h, "weight": weight}[self.where]
        if place.requires_grad:
            place.register_hook(lambda g: 2 * g)
        return F.linear(h, weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["batch", "activation", "weight"])
def test_hooks_of_a_critic_on_gradients_are_called(where: str, backend: str) -> None:
    critic = Hooked(where).double()
    real, fake, eps = batch(5, 6)
    loss = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss, backend)
    assert_exactly_as(loss(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
    penalty = compiled(lambda x: gpk.r1_penalty(critic, x, reduction="none").mean(), backend)
    assert_exactly_as(penalty(real), plain_penalty(critic, real, 0.0), critic)


def test_hooks_beside_gradients_at_the_samples() -> None:
    critic = Hooked("activation").double()
    real, fake, eps = batch(5, 6)
    real.requires_grad_()
    loss = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss)(real, fake, eps)
    (found,) = torch.autograd.grad(loss, real)
    (exact,) = torch.autograd.grad(-critic(real).mean(), real)
    torch.testing.assert_close(found, exact)
    with pytest.raises(RuntimeError, match="model registers hooks on gradients, and x requires a gradient"):
        compiled(lambda x: gpk.input_gradient(critic, x))(real)


def test_gradients_at_the_samples_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "program", None)
    critic, (real, fake, eps) = mlp(6, 8, 1).double(), batch(5, 6)
    real.requires_grad_()
    loss = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss)(real, fake, eps)
    torch.testing.assert_close(*(torch.autograd.grad(y, real) for y in (loss, -critic(real).mean())))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "gpkernels"])
def test_weights_of_a_head_that_no_loss_uses_have_no_gradient(backend: str) -> None:
    critic = TwoHeads().double()
    real, fake, eps = batch(5, 6)
    loss = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss, backend)
    gradient = compiled(lambda x: gpk.value_and_input_gradient(critic, x)[1].square().sum(1).mean(), backend)
    for _ in range(2):
        assert_exactly_as(loss(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
        assert_exactly_as(gradient(real), plain_penalty(critic, real, 0.0), critic)


def test_batches_whose_layout_or_image_size_changes() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
    critic = nn.Sequential(*layers).double()
    loss = gpk.CriticLoss(critic, penalty="r1")
    step = compiled(lambda r, f: loss(r, f).loss, "eager")
    for size, wide in ((6, 6), (6, 8), (6, 9), (7, 7), (8, 9)):
        real, fake, eps = (x[..., :size] if x.dim() == 4 else x for x in batch(4, 3, size, wide))
        assert_exactly_as(step(real, fake), plain_loss(critic, real, fake, eps, penalty="r1"), critic)
        critic[1] = nn.Sequential(critic[1], nn.Tanh())  # which is traced anew


class Spread(nn.Module):
    """A critic whose samples are broadcast against weights on an axis that is not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.top = nn.Parameter(torch.randn(3, 6)), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top((x[:, None].expand(-1, 3, -1) * self.weight).tanh().sum(1))


def test_broadcast_samples_of_a_dynamic_number() -> None:
    critic = Spread().double()
    loss = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss, dynamic=True)
    penalty = compiled(lambda x: gpk.input_gradient(critic, x).square().flatten(1).sum(1).mean(), dynamic=True)
    for n in (5, 3):
        real, fake, eps = batch(n, 6)
        assert_exactly_as(loss(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
        assert_exactly_as(penalty(real), plain_penalty(critic, real, 0.0), critic)


def test_batch_norm_by_running_statistics() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double().eval()
    real, fake, eps = batch(5, 6)
    loss = gpk.CriticLoss(critic)
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss)
    assert_exactly_as(step(real, fake, eps), plain_loss(critic, real, fake, eps), critic)


@pytest.mark.parametrize("make", [Broken, lambda: SMALL["GRU, N 4"].make()])
def test_a_critic_that_breaks_the_graph_goes_as_outside(make: Callable[[], nn.Module]) -> None:
    critic = make().double()
    real, fake, eps = batch(8, 6) if isinstance(critic, Broken) else batch(*SMALL["GRU, N 4"].shape)
    step = torch.compile(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss, backend="aot_eager")
    penalty = torch.compile(lambda r, f, e: gpk.gradient_penalty(critic, r, f, eps=e), backend="aot_eager")
    gradient = torch.compile(
        lambda x: gpk.input_gradient(critic, x).flatten(1).square().sum(1).mean(), backend="aot_eager"
    )
    for _ in range(2):
        exact = plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"))
        assert_exactly_as(gradient(real), plain_penalty(critic, real, 0.0), critic)
        assert_exactly_as(step(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
        assert_same(gradients(penalty(real, fake, eps), critic), gradients(exact, critic))


def test_a_critic_that_breaks_the_graph_is_not_traced_again() -> None:
    critic, (real, fake, eps) = Broken().double(), batch(8, 6)
    loss, runs = gpk.CriticLoss(critic), []

    def counted_by(graph: torch.fx.GraphModule, _: Any) -> Any:
        return lambda *args: (runs.append(graph), graph(*args))[1]

    step = torch.compile(lambda r, f, e: loss(r, f, eps=e).loss, backend=counted_by)
    for turn in range(4):
        runs.clear()
        assert_exactly_as(step(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
        assert turn < 2 or not runs
    loss.critic = mlp(6, 16, 1).double()
    assert_exactly_as(step(real, fake, eps), plain_loss(loss.critic, real, fake, eps), loss.critic)
    assert runs


def test_a_dispatch_mode_around_a_compiled_step() -> None:
    critic = mlp(6, 16, 1).double()
    real, fake, eps = batch(8, 6)
    step = torch.compile(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss, backend="aot_eager")
    with Count():
        ours = step(real, fake, eps)
    assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    critic = mlp(6, 32, 32, 1)
    real, fake, eps = (x.float() for x in batch(16, 6))
    exact = gradients(plain_loss(critic, real, fake, eps), critic)

    def ours(r: Tensor, f: Tensor, e: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return gpk.CriticLoss(critic)(r, f, eps=e).loss

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found = compiled(ours)(real, fake, eps)
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_loss(critic, real, fake, eps)
    errors = []
    for loss in (found, plain):
        assert loss.dtype == torch.float32
        got = gradients(loss, critic)
        errors.append(torch.stack([(a - b).norm() for a, b in zip(got, exact, strict=True)]).norm())
    assert 0 < errors[0] <= 2 * errors[1]


def test_a_training_loop_around_it() -> None:
    critic = mlp(6, 16, 16, 1).double()
    twin = copy.deepcopy(critic)
    adams = [torch.optim.Adam(c.parameters(), 1e-2) for c in (critic, twin)]
    loss = gpk.CriticLoss(critic)
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss)
    for turn in range(4):
        torch.manual_seed(turn)
        real, fake, eps = batch(8, 6)
        for adam, value in zip(adams, (step, lambda r, f, e: plain_loss(twin, r, f, e)), strict=True):
            adam.zero_grad()
            value(real, fake, eps).backward()
            adam.step()
    assert_same(list(critic.parameters()), list(twin.parameters()))


def test_backward_and_the_update_inside() -> None:
    critic = mlp(6, 16, 1).double()
    twin = copy.deepcopy(critic)
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic)

    def step(r: Tensor, f: Tensor, e: Tensor) -> None:
        found = torch.autograd.grad(loss(r, f, eps=e).loss, list(critic.parameters()))
        with torch.no_grad():
            for p, g in zip(critic.parameters(), found, strict=True):
                p.sub_(0.1 * g)

    plain_loss(twin, real, fake, eps).backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled(step)(real, fake, eps)
    assert_same(list(critic.parameters()), list(twin.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "aot_eager", "fullgraph": True},
        {"backend": "gpkernels", "dynamic": False},
        {"options": {"max_autotune": False}},
    ],
)
def test_a_module_that_compiles_itself(options: dict[str, Any]) -> None:
    critic = mlp(6, 16, 1).double()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic)
    loss.compile(**options)
    for _ in range(2):
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)


def test_transforms_inside_a_compiled_function() -> None:
    critic = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    weights, (real, fake, eps) = dict(critic.named_parameters()), batch(8, 6)

    def slope(weights: dict[str, Tensor]) -> Tensor:
        return gpk.gradient_penalty(lambda x: torch.func.functional_call(critic, weights, (x,)), real, fake, eps=eps)

    found = compiled(torch.func.grad(slope))(weights)
    exact = torch.autograd.grad(
        gpk.gradient_penalty(critic, real, fake, eps=eps), [*weights.values()], allow_unused=True
    )
    for name, g in zip(weights, exact, strict=True):
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]) if g is None else g)


def test_a_second_backward_is_an_error() -> None:
    critic = mlp(6, 16, 1).double()
    real, fake, eps = batch(8, 6)
    loss = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss)(real, fake, eps)
    weight = next(critic.parameters())
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"not have been used|double backward"):
        torch.autograd.grad(gradient.sum(), weight)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


TWICE: dict[str, Callable[..., Tensor]] = {
    "step": lambda critic, r, f: gpk.CriticLoss(critic)(r, f).loss,
    "penalty": lambda critic, r, f: gpk.r1_penalty(critic, r),
    "gradient": lambda critic, r, f: gpk.input_gradient(critic, r).square().sum(),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_second_backward_of_a_trace_that_runs_as_it_is_is_an_error(name: str) -> None:
    critic, (real, fake, _) = mlp(6, 16, 1).double(), batch(8, 6)
    loss = compiled(lambda r, f: TWICE[name](critic, r, f), "eager")(real, fake)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*fast_double_backward"):
        torch.autograd.grad(loss, next(critic.parameters()), create_graph=True)


@pytest.mark.parametrize("backend", ["eager", "gpkernels"])
@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("where", ["samples", "weights"])
def test_forward_mode_tangents_are_not_dropped(name: str, where: str, backend: str) -> None:
    critic, (real, fake, _) = mlp(6, 16, 1).double(), batch(8, 6)
    weight = critic[0].weight.detach()
    call = compiled(lambda r, f: TWICE[name](critic, r, f), backend)
    penalised = name == "penalty" and where == "samples"  # which are detached
    for _ in range(2):
        call(real, fake)
        with forward_ad.dual_level():
            if where == "weights":
                del critic[0].weight
                critic[0].weight = forward_ad.make_dual(weight, torch.ones_like(weight))
            x = forward_ad.make_dual(real, fake) if where == "samples" else real
            with nullcontext() if penalised else pytest.raises(RuntimeError, match="with a forward-mode tangent"):
                assert forward_ad.unpack_dual(call(x, fake)).tangent is None
        critic[0].weight = nn.Parameter(weight)


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_refused(strict: bool) -> None:
    real, fake, eps = batch(8, 6)
    with pytest.raises(Exception, match=r"torch\.export cannot hold a gradient of the critic"):
        torch.export.export(gpk.CriticLoss(mlp(6, 16, 1).double()), (real, fake), {"eps": eps}, strict=strict)


def test_errors_name_the_argument() -> None:
    critic = mlp(6, 16, 1).double()
    real, fake, eps = batch(8, 6)
    cases = {
        "fake: expected the shape of real": lambda: gpk.gradient_penalty(critic, real, fake[:3], eps=eps[:3]),
        "expected scores that depend on the input": lambda: gpk.r1_penalty(lambda x: x.detach() * 2, real),
        "expected a score for each of 8 samples": lambda: gpk.r1_penalty(lambda x: critic(x)[:4], real),
    }
    for message, call in cases.items():
        torch.compiler.reset()
        with pytest.raises(Exception, match=message):
            compiled(call)()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_distributed_data_parallel_around_the_critic(tmp_path: Any) -> None:
    critic = mlp(6, 16, 1).double()
    real, fake, eps = batch(8, 6)
    exact = gradients(plain_loss(critic, real, fake, eps), critic)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss = gpk.CriticLoss(DistributedDataParallel(critic))
        torch.compile(lambda r, f, e: loss(r, f, eps=e).loss, backend="aot_eager")(real, fake, eps).backward()
        whole = DistributedDataParallel(gpk.CriticLoss(critic))
        first = [p.grad.clone() for p in critic.parameters()]
        critic.zero_grad()
        torch.compile(whole, backend="aot_eager")(real, fake, eps=eps).loss.backward()
    finally:
        dist.destroy_process_group()
    for found in (first, [p.grad for p in critic.parameters()]):
        assert_same(found, exact)
