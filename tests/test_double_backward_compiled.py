"""`fast_double_backward()` gives PyTorch's numbers: compiled, in place, pooled, transformed, and to the third order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad

import gpkernels as gpk
from counting import Count, counted
from critics import MaxPooled, dcgan
from gpkernels.critic.double_backward import depth

Context = Callable[[], AbstractContextManager[object]]
Step = Callable[[nn.Module, Tensor, Context], Tensor]
BACKENDS = ("eager", "aot_eager")


pytestmark = pytest.mark.usefixtures("compiler_anew")


def critic_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(0.2, True), nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 1)).double()


def points() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(critic: nn.Module, x: Tensor, context: Context) -> Tensor:
    """A penalty as everyone writes it."""
    with context():
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def norm_outside(critic: nn.Module, x: Tensor, context: Context) -> Tensor:
    """The same, with the context around as little as may be."""
    x = x.detach().requires_grad_()
    with context():
        scores = critic(x)
    (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def _uncompiled(critic: nn.Module, x: Tensor) -> Tensor:
    return critic(x)


def critic_uncompiled(critic: nn.Module, x: Tensor, context: Context) -> Tensor:
    """The same, with a critic that the compiler leaves alone."""
    with context():
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(torch.compiler.disable(_uncompiled)(critic, x).sum(), x, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def whole(critic: nn.Module, x: Tensor, context: Context) -> Tensor:
    """The same, with its backward pass."""
    loss = step(critic, x, context)
    loss.backward()
    return loss.detach()


Outcome = tuple[Tensor, list[Tensor | None]] | str


def outcome(penalty: Callable[[], Tensor], critic: nn.Module) -> Outcome:
    """Return a penalty's value and weight gradients, or PyTorch's error."""
    critic.zero_grad()
    try:
        loss = penalty()
        if loss.requires_grad:
            loss.backward()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return loss.detach(), [p.grad for p in critic.parameters()]


def assert_same(ours: Outcome, exact: Outcome) -> None:
    """The same numbers or the same error; None stands for nothing but zeros."""
    if isinstance(ours, str) or isinstance(exact, str):
        assert ours == exact
        return
    torch.testing.assert_close(ours[0], exact[0])
    for a, b in zip(ours[1], exact[1], strict=True):
        if a is None or b is None:
            assert all(g is None or not g.any() for g in (a, b))
        else:
            torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert depth() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", [step, norm_outside, critic_uncompiled, whole])
def test_a_compiled_step_around_it(made: Step, backend: str) -> None:
    critic, x = critic_of(), points()
    exact = outcome(lambda: step(critic, x, nullcontext), critic)
    found = []
    for context in (nullcontext, gpk.fast_double_backward):
        torch._dynamo.reset()
        compiled = torch.compile(made, backend=backend)
        for _ in range(2):
            found.append(outcome(lambda c=context, f=compiled: f(critic, x, c), critic))
    plain, ours = found[:2], found[2:]
    assert not isinstance(exact, str)
    for one in ours:
        assert_same(one, exact if isinstance(one, tuple) else plain[0])


def gradients_of_penalty(critic: nn.Module, x: Tensor, context: Context) -> tuple[Tensor, list[Tensor | None]]:
    loss = step(critic, x, context)
    weights = [p for p in critic.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, weights, allow_unused=True))


TRACED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP, in place": (critic_of, (5, 6)),
    "MLP, clamped": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(), nn.Linear(8, 8), nn.ReLU6(True), nn.Linear(8, 1)),
        (5, 6),
    ),
    "DCGAN": (lambda: dcgan(3, 4, 16), (2, 3, 16, 16)),
    "max pooling": (lambda: MaxPooled(3, 4), (2, 3, 16, 16)),
    "average pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 1)
        ),
        (2, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", TRACED)
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_compiled_graph_has_the_work_of_the_eager_rules(name: str) -> None:
    make, shape = TRACED[name]
    critic, x = make().double(), torch.randn(shape, dtype=torch.float64)
    critic(x)
    exact = gradients_of_penalty(critic, x, nullcontext)
    eager = counted(lambda: gradients_of_penalty(critic, x, gpk.fast_double_backward))
    counts: list[Count] = []

    def run_by(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*args: object) -> object:
            with Count() as count:
                out = graph.forward(*args)
            counts.append(count)
            return out

        return make_boxed_func(run)

    compiled = torch.compile(gradients_of_penalty, backend=aot_autograd(fw_compiler=run_by), fullgraph=True)
    assert_same(compiled(critic, x, gpk.fast_double_backward), exact)
    (count,) = counts
    assert 0 < count.flops <= eager.flops
    assert len(count.zeros) <= len(eager.zeros)


def sub_module(critic: nn.Sequential, backend: str) -> nn.Module:
    return nn.Sequential(critic[0], torch.compile(critic[1:5], backend=backend), *critic[5:])


def whole_critic(critic: nn.Sequential, backend: str) -> nn.Module:
    return torch.compile(critic, backend=backend)


def function_in_it(critic: nn.Sequential, backend: str) -> nn.Module:
    compiled = torch.compile(lambda x: F.relu(x) * 2, backend=backend)

    class Critic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return critic[2:](compiled(critic[0](x)))

    return Critic()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", [sub_module, whole_critic, function_in_it])
def test_a_compiled_part_inside_it(build: Callable[[nn.Sequential, str], nn.Module], backend: str) -> None:
    critic, x = critic_of(), points()
    found = []
    for context in (nullcontext, gpk.fast_double_backward):
        torch._dynamo.reset()
        built = build(critic, backend)
        for _ in range(2):
            found.append(outcome(lambda c=context, b=built: step(b, x, c), critic))
    plain, ours = found[:2], found[2:]
    assert_same(ours[0], plain[0])
    assert_same(ours[1], plain[1])
    assert backend != "eager" or not isinstance(ours[0], str)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_backward_of_a_critic_that_was_called_inside_it(backend: str) -> None:
    critic, x = critic_of(), points()

    def back(scores: Tensor, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()

    def penalty(context: Context, inside: bool) -> Tensor:
        compiled, leaf = torch.compile(back, backend=backend), x.detach().requires_grad_()
        with context():
            scores = critic(leaf)
            if inside:
                return compiled(scores, leaf)
        return compiled(scores, leaf)

    exact = outcome(lambda: penalty(nullcontext, True), critic)
    assert isinstance(exact, str) == (backend == "aot_eager")
    for inside in (True, False):
        assert_same(outcome(lambda i=inside: penalty(gpk.fast_double_backward, i), critic), exact)


@pytest.mark.parametrize("name", ["a value is read", "GRU"])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_critic_that_breaks_the_graph_inside_it(name: str) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gru = nn.Linear(6, 8), nn.Linear(8, 1), nn.GRU(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            h = h * float(h.detach().mean()) if name == "a value is read" else self.gru(h)[0]
            return self.b(F.leaky_relu(h, 0.2, True))

    critic, x = Critic().double(), points()
    exact = outcome(lambda: step(critic, x, nullcontext), critic)
    compiled = torch.compile(step, backend="eager")
    assert not isinstance(exact, str)
    for _ in range(2):
        assert_same(outcome(lambda: compiled(critic, x, gpk.fast_double_backward), critic), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_penalty_of_the_library_in_a_compiled_step_inside_it(backend: str) -> None:
    critic, x = critic_of(), points()

    def penalty(context: Context) -> Tensor:
        with context():
            return gpk.r1_penalty(critic, x)

    exact = outcome(lambda: penalty(nullcontext), critic)
    ours = outcome(lambda: torch.compile(penalty, backend=backend)(gpk.fast_double_backward), critic)
    assert_same(ours, exact)


# --- layers -----------------------------------------------------------------------------------------------------------

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x, True),
    "relu_": torch.relu_,
    "the method relu_": lambda x: x.relu_(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2, True),
    "leaky_relu of slope 0": lambda x: F.leaky_relu(x, 0.0, True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5, True),
    "relu6": lambda x: F.relu6(x, True),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0, True),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_calls_in_place(name: str) -> None:
    function = IN_PLACE[name]

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            out = function(h)
            assert out is h
            return self.b(out) + h.sum(1, keepdim=True)  # what was written is read

    critic = Critic().double()
    exact = outcome(lambda: step(critic, points(), nullcontext), critic)
    assert not isinstance(exact, str)
    assert_same(outcome(lambda: step(critic, points(), gpk.fast_double_backward), critic), exact)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("kind", ["a leaf", "a view of a leaf", "a view"])
def test_what_cannot_be_written_raises_as_in_pytorch_or_gives_its_numbers(kind: str, name: str) -> None:
    def called(context: Context) -> str | list[Tensor]:
        x = points().requires_grad_()
        given = {"a leaf": x, "a view of a leaf": x[:3], "a view": (x * 2)[:3]}[kind]
        try:
            with context():
                y = IN_PLACE[name](given)
            (grad,) = torch.autograd.grad(y.sum(), x)
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return [y.detach(), grad]

    ours, exact = called(gpk.fast_double_backward), called(nullcontext)
    assert type(ours) is type(exact)
    torch.testing.assert_close(ours, exact) if isinstance(ours, list) else None
    assert isinstance(ours, list) or ours == exact


POOLS: dict[str, Callable[..., Tensor]] = {
    "max": lambda x, d, **o: getattr(F, f"max_pool{d}d")(x, 3, 2, 1, **o),
    "max, overlapping and dilated": lambda x, d, **o: getattr(F, f"max_pool{d}d")(x, 2, 1, 0, 2, **o),
    "average": lambda x, d: getattr(F, f"avg_pool{d}d")(x, 2),
    "average, padded": lambda x, d: getattr(F, f"avg_pool{d}d")(x, 3, 2, 1, True, False),
    "adaptive max": lambda x, d, **o: getattr(F, f"adaptive_max_pool{d}d")(x, 2, **o),
    "adaptive average": lambda x, d: getattr(F, f"adaptive_avg_pool{d}d")(x, 2),
    "adaptive average of all": lambda x, d: getattr(F, f"adaptive_avg_pool{d}d")(x, 1),
}
ORDERS = {2: torch.channels_last, 3: torch.channels_last_3d}


POOLED = [
    (name, d, indices, channels_last)
    for name in POOLS
    for d in (1, 2, 3)
    for indices in (False, True)
    for channels_last in (False, True)
    if (not indices or "max" in name) and (not channels_last or d > 1)
]


@pytest.mark.parametrize(("name", "d", "indices", "channels_last"), POOLED)
def test_pools(name: str, d: int, indices: bool, channels_last: bool) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = getattr(nn, f"Conv{d}d")(2, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            if channels_last:
                h = h.contiguous(memory_format=ORDERS[d])
            if indices:
                h, places = POOLS[name](h, d, return_indices=True)
                h = h * (1 + places % 3)
            else:
                h = POOLS[name](h, d)
            return h.flatten(1).square().sum(1)

    critic = Critic().double()
    x = torch.randn(2, 2, *[6] * d, dtype=torch.float64)
    exact = outcome(lambda: step(critic, x, nullcontext), critic)
    assert not isinstance(exact, str)
    assert_same(outcome(lambda: step(critic, x, gpk.fast_double_backward), critic), exact)


LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "relu": (F.relu, (2, 3)),
    "relu in place": (lambda x: F.relu(x.clone(), True), (2, 3)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), (2, 3)),
    "leaky_relu in place": (lambda x: F.leaky_relu(x.clone(), 0.2, True), (2, 3)),
    "hardtanh in place": (lambda x: F.hardtanh(x.clone(), -0.6, 0.6, True), (2, 3)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (1, 1, 4, 4)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (1, 1, 2, 2, 2)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (1, 1, 4, 4)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (1, 1, 4, 4)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), (1, 1, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_to_the_third_order(name: str) -> None:
    layer, shape = LAYERS[name]
    # All entries apart, and none near a kink.
    count = torch.Size(shape).numel()
    x = (torch.randperm(count).double() - count / 2 + 0.3).div(count / 4).reshape(shape).requires_grad_()

    def slope(x: Tensor) -> Tensor:
        with gpk.fast_double_backward():
            y = torch.tanh(layer(x.sin() + x)).square().sum()
            return torch.autograd.grad(y, x, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (x,))
    assert torch.autograd.gradgradcheck(slope, (x,))


def test_transforms_inside_it_have_their_own_derivatives() -> None:
    critic, x = critic_of(), points()

    def norm(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: critic(x).sum())(x).square().sum()

    exact = outcome(lambda: norm(x), critic)
    with gpk.fast_double_backward():
        ours = outcome(lambda: norm(x), critic)
        twice = torch.func.grad(norm)(x)
        each = torch.func.vmap(torch.func.grad(lambda x: critic(x).sum()))(x)
        tangent = torch.func.jvp(lambda x: critic(x), (x,), (x,))[1]
        with forward_ad.dual_level():
            leaf = forward_ad.make_dual(x.clone().requires_grad_(), x)
            dual = forward_ad.unpack_dual(critic(leaf)).tangent
    assert_same(ours, exact)
    torch.testing.assert_close(twice, torch.func.grad(norm)(x))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(critic(leaf).sum(), leaf)[0])
    torch.testing.assert_close(tangent, torch.func.jvp(lambda x: critic(x), (x,), (x,))[1])
    torch.testing.assert_close(dual, tangent)


def test_contexts_are_counted_in_their_own_thread() -> None:
    assert depth() == 0
    with gpk.fast_double_backward():
        assert depth() == 1
        with gpk.fast_double_backward(), nullcontext():
            assert depth() == 2
    assert depth() == 0
