"""Penalties and losses inside `torch.compile`: one graph, PyTorch's numbers, no double backward, never stale."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import gpkernels as gpk
from comparing import assert_exactly_as, assert_same, batch, gradients
from counting import Count, counted
from critics import Featured, dcgan, mlp, plain_loss, plain_penalty
from gpkernels import backends
from gpkernels.bench.small import SMALL
from gpkernels.compiler import as_program
from gpkernels.critic.step import LARGE

pytestmark = pytest.mark.usefixtures("compiler_anew")


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


class Labelled(nn.Module):
    """A critic of samples and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.labels, self.top = nn.Linear(6, 8), nn.Embedding(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        h = self.a(x).tanh()
        return self.top(h).squeeze(1) + scale * (h * self.labels(y)).sum(1)


@pytest.mark.parametrize("backend", ["aot_eager", "gpkernels"])
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_further_inputs_of_the_critic(kind: str, backend: str) -> None:
    critic, (real, fake, eps) = Labelled().double(), batch(5, 6)
    labels = torch.tensor([0, 2, 3, 2, 1])

    def ours(r: Tensor, f: Tensor, e: Tensor, y: Tensor) -> Tensor:
        options = {"critic_args": (y,), "critic_kwargs": {"scale": 0.5}}
        return gpk.CriticLoss(critic, penalty=kind)(r, f, eps=e if kind == "wgan-gp" else None, **options).loss

    step = compiled(ours, backend)
    for _ in range(2):
        exact = plain_loss(lambda x: critic(x, labels, scale=0.5), real, fake, eps, penalty=kind)
        assert_exactly_as(step(real, fake, eps, labels), exact, critic)


def test_one_batch_is_refused_where_it_cannot_be() -> None:
    loss, (real, fake, _) = gpk.CriticLoss(Labelled().double(), together=True, penalty="r1"), batch(4, 6)
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(Exception, match="together: expected None or False with further inputs, got True"):
        compiled(lambda r, f, y: loss(r, f, critic_args=(y,)).loss)(real, fake, labels)
    loss = gpk.CriticLoss(mlp(6, 8, 1).double(), together=True, penalty="r1")
    with pytest.raises(Exception, match="together: expected None or False with batches of different sizes, got True"):
        compiled(lambda r, f: loss(r, f).loss)(real, fake[:3])


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
        programs = [lists.forward, *(one for own in lists.backward for one in (own.whole, *own.alone))]
        for part in (one for program in programs for one in program.parts):
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


class Products(nn.Module):
    """A critic that multiplies samples by a weight without an axis of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return torch.einsum("ni,nj,ij->n", h.tanh(), h, self.b)


def test_two_compilations_serve_every_size_of_one_batch() -> None:
    critic = Products().double()
    loss, counter = gpk.CriticLoss(critic, together=True), CompileCounterWithBackend("eager")
    step = compiled(lambda r, f, e: loss(r, f, eps=e).loss, counter)
    for n in (5, 7, 4, 16):
        real, fake, eps = batch(n, 6)
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
