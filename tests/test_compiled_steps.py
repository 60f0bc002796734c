"""Penalties and losses inside `torch.compile`: one graph, PyTorch's numbers, no double backward, never stale."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

import gpkernels as gpk
from comparing import assert_exactly_as, assert_same, batch, gradients
from counting import Count, counted
from critics import Featured, dcgan, mlp, plain_loss, plain_penalty, plain_points
from gpkernels import backends
from gpkernels.bench.small import SMALL
from gpkernels.compiler import as_program
from gpkernels.critic.step import LARGE


@pytest.fixture(autouse=True)
def _compiler_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def small(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    case = SMALL[name]
    torch.manual_seed(0)
    return case.make().double(), batch(*case.shape)


def has_dropout(critic: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) for module in critic.modules())


@pytest.mark.parametrize("name", [name for name in SMALL if "GRU" not in name and "LSTM" not in name])
def test_a_step_of_every_small_critic(name: str) -> None:
    critic, (real, fake, eps) = small(name)
    twin = copy.deepcopy(critic)
    loss = gpk.CriticLoss(critic, together=False if has_dropout(critic) else None)  # one batch would draw one mask
    torch.manual_seed(1)
    exact = plain_loss(twin, real, fake, eps)
    torch.manual_seed(1)
    ours = compiled(lambda r, f, e: loss(r, f, eps=e).loss)(real, fake, eps)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    assert_same(gradients(ours, critic), gradients(exact, twin))
    for a, b in zip(critic.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["tanh, N 2", "DCGAN GroupNorm, N 2", "residual, N 2", "attention, N 4"])
def test_as_one_batch(name: str) -> None:
    critic, (real, fake, eps) = small(name)
    exact = plain_loss(critic, real, fake, eps)
    loss = gpk.CriticLoss(critic, together=True)
    assert_exactly_as(compiled(lambda r, f, e: loss(r, f, eps=e).loss)(real, fake, eps), exact, critic)


@pytest.mark.parametrize("name", ["DCGAN BatchNorm, N 2", "StyleGAN2, N 4"])
def test_samples_that_meet_are_refused_as_one_batch(name: str) -> None:
    critic, (real, fake, eps) = small(name)
    with pytest.raises(RuntimeError, match="together: expected a critic whose samples are independent"):
        compiled(lambda r, f, e: gpk.CriticLoss(critic, together=True)(r, f, eps=e).loss)(real, fake, eps)


@pytest.mark.parametrize("kind", ["none", "wgan-gp", "r1", "r2", "dragan"])
@pytest.mark.parametrize("objective", ["wgan", "gan"])
def test_every_loss(kind: str, objective: str) -> None:
    critic = mlp(6, 16, 16, 1).double()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic, objective=objective, penalty=kind, one_sided=True)
    torch.manual_seed(3)
    exact = loss(real, fake, eps=eps)
    torch.manual_seed(3)
    ours = compiled(lambda r, f, e: loss(r, f, eps=e))(real, fake, eps)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)
    assert [x.requires_grad for x in ours] == [True, False, False, False]
    assert_exactly_as(ours.loss, exact.loss, critic)


def test_the_consistency_term_with_features() -> None:
    critic = Featured().double()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic, consistency_weight=2.0, consistency_margin=0.1, together=False)
    torch.manual_seed(3)
    exact = loss(real, fake, eps=eps)
    torch.manual_seed(3)
    ours = compiled(lambda r, f, e: loss(r, f, eps=e))(real, fake, eps)
    torch.testing.assert_close(ours.consistency, exact.consistency)
    assert_exactly_as(ours.loss, exact.loss, critic)


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "gradient": lambda critic, r, f, e: gpk.gradient_penalty(critic, r, f, eps=e),
    "one-sided": lambda critic, r, f, e: gpk.gradient_penalty(critic, r, f, eps=e, one_sided=True, target=0.2),
    "r1": lambda critic, r, f, e: gpk.r1_penalty(critic, r),
    "r2": lambda critic, r, f, e: gpk.r2_penalty(critic, f),
    "eikonal": lambda critic, r, f, e: gpk.eikonal_loss(critic, r),
    "labels": lambda critic, r, f, e: gpk.gradient_penalty(lambda x, y: critic(x * y), r, f, eps=e, critic_args=(f,)),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("way", ["C++", "Python"])
def test_every_penalty(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    inputs = batch(8, 6)
    exact = PENALTIES[name](critic, *inputs)
    if way == "Python":
        monkeypatch.setattr(backends, "program", None)
    ours = compiled(PENALTIES[name])(critic, *inputs)
    torch.testing.assert_close(ours, exact)
    assert_same(gradients(ours, critic), gradients(exact, critic))


@pytest.mark.parametrize("kind", ["wgan-gp", "r1", "r2"])
def test_gradients_at_the_samples(kind: str) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    real, fake, eps = batch(8, 6)
    real.requires_grad_()
    fake.requires_grad_()
    loss = compiled(lambda r, f, e: gpk.CriticLoss(critic, penalty=kind)(r, f.sin(), eps=e).loss)(real, fake, eps)
    assert_exactly_as(loss, plain_loss(critic, real, fake.sin(), eps, penalty=kind), critic, inputs=(real, fake))


def test_nothing_is_differentiated_without_grad_mode() -> None:
    critic = mlp(6, 16, 1).double()
    real, fake, eps = batch(8, 6)
    with torch.no_grad():
        ours = compiled(lambda r, f, e: gpk.CriticLoss(critic)(r, f, eps=e))(real, fake, eps)
        penalty = compiled(lambda x: gpk.r1_penalty(critic, x))(real)
    assert not ours.loss.requires_grad
    torch.testing.assert_close(ours.loss, plain_loss(critic, real, fake, eps).detach())
    torch.testing.assert_close(penalty, plain_penalty(critic, real, 0.0).detach())


# --- work -------------------------------------------------------------------------------------------------------------


def flops(function: Callable[[], Tensor]) -> float:
    """Of a compiled function and its backward pass, once it is compiled."""
    total = 0

    def run_by(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal total
            with Count() as count:
                out = graph.forward(*args)
            total += count.flops
            assert not count.zeros
            return out

        return make_boxed_func(run)

    call = compiled(function, aot_autograd(fw_compiler=run_by, bw_compiler=run_by))
    call().backward()
    total = 0
    call().backward()
    return total


WORK: dict[str, tuple[float, Callable[..., Tensor]]] = {
    "penalty": (4.05, lambda critic, r, f, e: gpk.gradient_penalty(critic, r, f, eps=e)),
    "step": (10.05, lambda critic, r, f, e: gpk.CriticLoss(critic)(r, f, eps=e).loss),
    "step as one batch": (10.05, lambda critic, r, f, e: gpk.CriticLoss(critic, together=True)(r, f, eps=e).loss),
    "r1 with its loss": (7.05, lambda critic, r, f, e: gpk.CriticLoss(critic, penalty="r1")(r, f, eps=e).loss),
}


@pytest.mark.parametrize("kind", ["mlp", "dcgan"])
@pytest.mark.parametrize("name", WORK)
def test_flops_are_counted(kind: str, name: str) -> None:
    critic, shape = (mlp(64, 128, 128, 1), (32, 64)) if kind == "mlp" else (dcgan(3, 8, 32), (4, 3, 32, 32))
    real, fake, eps = (x.float() for x in batch(*shape))
    forward = counted(lambda: critic(real)).flops
    bound, function = WORK[name]
    assert forward <= flops(lambda: function(critic, real, fake, eps)) <= bound * forward


CAPTURED: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "step": lambda critic, r, f: gpk.CriticLoss(critic)(r, f).loss,
    "step as one batch": lambda critic, r, f: gpk.CriticLoss(critic, together=True)(r, f).loss,
    "r1 step": lambda critic, r, f: gpk.CriticLoss(critic, objective="gan", penalty="r1")(r, f).loss,
    "dragan step": lambda critic, r, f: gpk.CriticLoss(critic, penalty="dragan")(r, f).loss,
    "gradient penalty": lambda critic, r, f: gpk.gradient_penalty(critic, r, f),
    "r1 penalty": lambda critic, r, f: gpk.r1_penalty(critic, r),
    "dragan penalty": lambda critic, r, f: gpk.dragan_penalty(critic, r),
}
DRAWS = {"rand", "randint", "instance_noise"}  # by the default generator, or by a key that is an argument
FORBIDDEN = ("item", "_local_scalar_dense", "nonzero", "device_put", "unique", "masked_select")


@pytest.mark.parametrize("by", ["Inductor", "gpkernels"])
@pytest.mark.parametrize("name", CAPTURED)
def test_the_graph_can_be_captured_on_a_gpu(name: str, by: str) -> None:
    """No value is read back, nothing is copied between devices, and what is drawn is drawn by PyTorch."""
    critic = dcgan(3, 4, 16)
    real, fake, _ = (x.float() for x in batch(4, 3, 16, 16))
    targets: list[str] = []
    devices: set[Any] = set()
    graphs: list[Any] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                targets.append(str(node.target))
                devices.add(node.kwargs.get("device", real.device))
        return make_boxed_func(graph.forward)

    def by_program(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        run = as_program(graph, inputs)
        graphs.append(run.__self__)
        return run

    backend = aot_autograd(fw_compiler=look) if by == "Inductor" else by_program
    call = compiled(lambda r, f: CAPTURED[name](critic, r, f), backend)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loss = call(real, fake)
        values.append(torch.stack([loss.detach(), *(g.sum() for g in gradients(loss, critic))]))
    torch.testing.assert_close(values[0], values[1])
    assert torch.equal(values[0], values[2]) == ("r1" in name)
    for graph in graphs:
        (lists,) = graph._lists.values()
        for part in (one for run in (lists.forward, lists.backward) if run is not None for one in run.parts):
            targets += [str(func) for func, *_ in part.calls]
            devices |= {kwargs.get("device", real.device) for _, _, kwargs, _ in part.calls}
    assert any("conv" in target for target in targets)
    assert {torch.device(device) for device in devices if device is not None} == {real.device}
    words = [target.removeprefix("aten.").removeprefix("gpkernels.") for target in targets]
    assert not [word for word in words if word.startswith(FORBIDDEN)]
    random = {word.partition(".")[0] for word in words if re.match("rand|bernoulli|normal|uniform|.*noise", word)}
    assert random <= DRAWS
    assert bool(random) == ("r1" not in name)


# --- compilations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "groups"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_two_compilations_serve_every_batch_size(kind: str, dynamic: bool | None) -> None:
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.GroupNorm(4, 8), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1)]
    critic, shape = (mlp(6, 16, 1), (6,)) if kind == "mlp" else (nn.Sequential(*layers), (3, 8, 8))
    critic.double()
    loss, counter = gpk.CriticLoss(critic), CompileCounterWithBackend("aot_eager")
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss, counter, dynamic=dynamic)
    for n in (4, 5, 16, 2, 64):
        real, fake, eps = batch(n, *shape)
        assert_exactly_as(step(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
    assert counter.frame_count <= 2


def test_two_compilations_serve_every_number() -> None:
    critic = mlp(6, 16, 1).double()
    real, fake, eps = batch(8, 6)
    loss, counter = gpk.CriticLoss(critic, one_sided=True), CompileCounterWithBackend("aot_eager")
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss, counter)
    for number in (10.0, 5.0, 1.0, 0.5, 0.1):
        loss.penalty_weight, loss.target = number, number / 3
        assert_exactly_as(step(real, fake, eps), loss(real, fake, eps=eps).loss, critic)
    assert counter.frame_count <= 2
    counter = CompileCounterWithBackend("aot_eager")
    penalty = compiled(lambda r, f, e, t: gpk.gradient_penalty(critic, r, f, target=t, eps=e), counter)
    for number in (1.0, 0.3, 0.2, 0.5):
        exact = gpk.gradient_penalty(critic, real, fake, target=number, eps=eps)
        assert_exactly_as(penalty(real, fake, eps, number), exact, critic)
    assert counter.frame_count <= 2


NUMBERS: dict[str, Callable[..., Tensor]] = {
    "a penalty of each sample": lambda critic, r, f, e, t: (
        gpk.gradient_penalty(critic, r, f, eps=e, target=t, reduction="none") * e
    ).sum(),
    "a penalty of packs": lambda critic, r, f, e, t: (
        gpk.gradient_penalty(lambda x: critic(x)[::2], r, f, eps=e[::2], target=t, pack=2, reduction="none") * e[::2]
    ).sum(),
    "dragan": lambda critic, r, f, e, t: gpk.dragan_penalty(critic, r, target=t, scale=2 * t),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_two_compilations_serve_every_number_of_a_penalty(name: str) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs, counter = batch(8, 6), CompileCounterWithBackend("eager")
    penalty = compiled(NUMBERS[name], counter)
    for number in (1.0, 0.3, 0.2, 0.5):
        torch.manual_seed(0)
        exact = NUMBERS[name](critic, *inputs, number)
        torch.manual_seed(0)
        assert_exactly_as(penalty(critic, *inputs, number), exact, critic)
    assert counter.frame_count <= 2


# --- never stale ------------------------------------------------------------------------------------------------------

GAIN = 1.0


class Odd(nn.Module):
    """A critic that reads attributes, flags, a global and a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.drop = nn.Dropout(0.5)
        self.layers = nn.ModuleList([nn.Linear(16, 16)])
        self.alpha = 0.3
        self.config = {"slope": 0.2}
        self.closure: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        h = self.closure(self.a(x)) * GAIN
        h = h + self.alpha * F.leaky_relu(self.b(h), self.config["slope"])
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.top(self.drop(h))


def _replace(critic: Odd) -> None:
    critic.b = nn.Linear(16, 16).double()


def _gain(critic: Odd) -> None:
    global GAIN
    GAIN = 2.0


def _hook(critic: Odd) -> None:
    critic.b.register_forward_hook(lambda module, args, out: out * 3)


def _closure(critic: Odd) -> None:
    factor = 0.7
    critic.closure = lambda x: torch.sin(x) * factor


CHANGES: dict[str, Callable[[Odd], Any]] = {
    "an attribute": lambda critic: setattr(critic, "alpha", 0.9),
    "an entry of a dict": lambda critic: critic.config.update(slope=0.5),
    "train": lambda critic: critic.train(),
    "a replaced layer": _replace,
    "an added layer": lambda critic: critic.layers.append(nn.Linear(16, 16).double()),
    "a frozen layer": lambda critic: critic.b.requires_grad_(False),
    "a hook": _hook,
    "a global": _gain,
    "a closure": _closure,
    "weights": lambda critic: nn.init.ones_(critic.a.weight),
}


@pytest.mark.parametrize("name", CHANGES)
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # PyTorch's default is not to look for new hooks
def test_nothing_is_stale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GAIN", 1.0)
    critic = Odd().double().eval()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic, together=False if name == "train" else None)  # one batch would draw one mask
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss)
    penalty = compiled(lambda x: gpk.r1_penalty(critic, x))
    for turn in range(2):
        for ours, exact in (
            (lambda: step(real, fake, eps), lambda: plain_loss(critic, real, fake, eps)),
            (lambda: penalty(real), lambda: plain_penalty(critic, real, 0.0)),
        ):
            torch.manual_seed(turn)
            known = exact()
            torch.manual_seed(turn)
            found = ours()
            torch.testing.assert_close(found, known)
            assert_same(gradients(found, critic), gradients(known, critic))
        if turn == 0:
            CHANGES[name](critic)


# --- one batch --------------------------------------------------------------------------------------------------------


class Switched(nn.Module):
    """A critic with an attribute that decides how samples interact, and a counter of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(6, 16), nn.Linear(16, 1)
        self.how, self.calls = "not at all", 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.a(x).tanh()
        if self.how == "outside the graph":
            h = h - h.detach().mean(0)
        elif self.how == "by their number":
            h = h / x.shape[0]
        elif self.how == "in the graph":
            h = h - h.mean(0)
        return self.top(h)


@pytest.mark.parametrize("how", ["outside the graph", "by their number", "in the graph"])
def test_samples_that_keep_to_themselves_go_as_one_batch(how: str) -> None:
    critic = Switched().double()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic)
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss)
    for state, calls in (("not at all", 1), (how, 3), ("not at all", 1)):
        critic.how = state
        for _ in range(2):
            critic.calls = 0
            ours = step(real, fake, eps)
            assert critic.calls == calls
            assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


def test_large_groups_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LARGE, True, 1000)
    critic = Switched().double()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic)
    ours = compiled(lambda r, f, e: loss(r, f, eps=e).loss)(real, fake, eps)
    assert critic.calls == 3
    assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


def test_each_compilation_learns_anew() -> None:
    critic = Switched().double()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic)
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss)
    step(real, fake, eps)
    critic.a = nn.Sequential(critic.a, nn.GELU()).double()
    critic.calls = 0
    assert_exactly_as(step(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
    assert critic.calls == 1 + 3


def test_another_version_of_the_compiler_goes_one_by_one_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._dynamo.comptime.ComptimeVar.as_fake")
    critic = Switched().double()
    real, fake, eps = batch(8, 6)
    loss = gpk.CriticLoss(critic)
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = step(real, fake, eps)
        penalty = compiled(lambda x: gpk.r1_penalty(critic, x))(real)
        torch.compiler.reset()
        critic.calls = 0
        assert_exactly_as(step(real, fake, eps), plain_loss(critic, real, fake, eps), critic)
    (message,) = [str(one.message) for one in told if "torch._dynamo.comptime" in str(one.message)]
    assert "has no torch._dynamo.comptime.ComptimeVar.as_fake: in torch.compile, groups" in message
    assert critic.calls == 3 + 3
    assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)
    assert_exactly_as(penalty, plain_penalty(critic, real, 0.0), critic)


# --- odd critics and surroundings -------------------------------------------------------------------------------------


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
