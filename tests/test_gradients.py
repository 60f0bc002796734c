"""input_gradient and value_and_input_gradient: PyTorch's numbers for any loss of the gradient and the value."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import gpkernels as gpk
from comparing import assert_exactly_as
from counting import counted
from critics import TwoHeads
from gpkernels import private
from gpkernels.critic import gradient as engine
from gpkernels.critic.by_autograd import left_to_autograd
from gpkernels.critic.plan import Plan
from gpkernels.private import tree_flatten, tree_unflatten

torch.manual_seed(0)


def plain(model: Callable[..., Any], x: Any) -> tuple[Any, Any]:
    """What people write."""
    tensors, structure = tree_flatten(x)
    moved = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
    value = model(tree_unflatten(moved, structure))
    scores = value[0] if isinstance(value, tuple) else value
    found = torch.autograd.grad(scores.sum(), moved, create_graph=True, allow_unused=True)
    return value, tree_unflatten(list(found), structure)


def mlp(act: nn.Module, out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 16), act, nn.Linear(16, 16), act, nn.Linear(16, out)).double()


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()


class WithFeatures(nn.Module):
    """Gives a value and features of it; its custom function has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.Tanh(), 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = Sine.apply(self.body(x))
        return h[:, :1], h[:, 1:]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 5, batch_first=True).double(), nn.Linear(5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


def conv() -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 1)).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ReLU": (lambda: mlp(nn.ReLU()), (7, 3)),
    "tanh": (lambda: mlp(nn.Tanh()), (7, 3)),
    "softplus": (lambda: mlp(nn.Softplus(100.0)), (7, 3)),
    "points of a batch": (lambda: mlp(nn.ReLU()), (2, 5, 3)),
    "one point": (lambda: mlp(nn.Tanh()), (3,)),
    "convolutions": (conv, (4, 3, 8, 8)),
    "features, a custom function": (WithFeatures, (7, 3)),
    "GRU": (Recurrent, (4, 6, 3)),
}
LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of the gradient": lambda y, g: (g.norm(dim=-1) - 1).abs().mean(),
    "of both": lambda y, g: (g - 0.3).square().sum() + (_scores(y) - 0.2).abs().mean() + _features(y).square().sum(),
    "of the value": lambda y, g: _scores(y).square().mean(),
}


def _scores(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _features(y: Any) -> Tensor:
    return y[1] if isinstance(y, tuple) else torch.zeros(())


@pytest.fixture(params=["by rules", "left to autograd"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls without a rule by themselves, or the whole model, by autograd."""
    if request.param == "by rules":
        monkeypatch.setattr(Plan, "leaves_too_much", lambda self: False)


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("trains", [False, True], ids=["weights", "weights and input"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_any_loss_has_pytorchs_gradients(name: str, loss: str, trains: bool) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(1)
    model, x = make(), torch.randn(shape, dtype=torch.float64)
    for _ in range(3):  # for the first time, while it is traced, by the program
        x = x.detach().clone().requires_grad_(trains)
        leaves = [*model.parameters(), *([x] if trains else [])]
        found = []
        for way in (gpk.value_and_input_gradient, plain):
            value, gradient = way(model, x)
            found.append((_scores(value), gradient, LOSSES[loss](value, gradient)))
        (value, gradient, ours), (exact_value, exact_gradient, exact) = found
        assert torch.equal(value, exact_value)
        torch.testing.assert_close(gradient, exact_gradient, rtol=1e-12, atol=1e-14)
        ours_at, exact_at = (torch.autograd.grad(one, leaves, allow_unused=True) for one in (ours, exact))
        for a, b in zip(ours_at, exact_at, strict=True):
            assert (a is None) == (b is None) or float((b if a is None else a).abs().max()) == 0  # type: ignore[union-attr]
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_a_head_that_no_loss_uses_have_no_gradient(loss: str) -> None:
    model, x = TwoHeads().double(), torch.randn(5, 6, dtype=torch.float64)
    for _ in range(3):
        ours, exact = (
            LOSSES[loss](y[0], g) for y, g in (way(model, x) for way in (gpk.value_and_input_gradient, plain))
        )
        assert_exactly_as(ours, exact, model)


@pytest.mark.parametrize(
    ("loss", "most"),
    [("of the gradient", 4.05), ("of both", 4.05)],
)
def test_a_piecewise_linear_model_costs_four_passes(loss: str, most: float) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    x = torch.randn(32, 64)

    def step(way: Callable[..., Any]) -> None:
        value, gradient = way(model, x)
        LOSSES[loss](value, gradient).backward()

    forward = counted(lambda: model(x)).flops
    assert counted(lambda: step(gpk.value_and_input_gradient)).flops <= most * forward
    assert counted(lambda: step(plain)).flops > 5.7 * forward


def test_several_inputs_keep_their_structure_and_unused_ones_give_none() -> None:
    first, second = mlp(nn.Tanh()), mlp(nn.ReLU())

    def model(x: dict[str, Any]) -> Tensor:
        a, b = x["pair"]
        return first(a) * second(b) + x["scale"].double().mean()

    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=k == 1) for k in range(2))
    x = {"pair": (a, b), "unused": torch.ones(2, dtype=torch.float64), "scale": torch.arange(3)}
    for _ in range(3):
        value, gradient = gpk.value_and_input_gradient(model, x)
        assert set(gradient) == set(x)
        assert gradient["unused"] is None
        assert gradient["scale"] is None  # whole numbers
        moved = a.detach().requires_grad_(), b.view_as(b)
        exact = torch.autograd.grad(model({**x, "pair": moved}).sum(), moved, create_graph=True)
        for g, e in zip(gradient["pair"], exact, strict=True):
            torch.testing.assert_close(g, e)
        leaves = [*first.parameters(), *second.parameters(), b]
        loss = lambda gs: (gs[0] * gs[1]).sum() + gs[1].square().sum()  # noqa: E731
        ours_at = torch.autograd.grad(loss(gradient["pair"]) + value.sum(), leaves, allow_unused=True)
        whole = loss(exact) + model({**x, "pair": (a, b)}).sum()
        exact_at = torch.autograd.grad(whole, leaves, allow_unused=True)
        for g, e in zip(ours_at, exact_at, strict=True):
            torch.testing.assert_close(g, e)


def test_an_intermediate_tensor_is_an_input() -> None:
    norm, trunk = nn.Linear(4, 3).double(), mlp(nn.ELU())
    observations = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(3):
        found = []
        for way in (gpk.value_and_input_gradient, plain):
            value, gradient = way(trunk, norm(observations))
            loss = gradient.square().sum() + F.softplus(value).mean()
            found.append(torch.autograd.grad(loss, [*norm.parameters(), *trunk.parameters()], allow_unused=True))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_forces_of_an_energy() -> None:
    """One energy of all atoms: samples meet, and the value is a scalar."""
    charges = nn.Parameter(torch.rand(5, dtype=torch.float64))
    positions, forces = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def energy(r: Tensor, power: float, *, scale: Tensor) -> Tensor:
        i, j = torch.triu_indices(5, 5, 1)
        return (scale[i] * scale[j] * (r[i] - r[j]).norm(dim=1) ** power).sum()

    for _ in range(3):
        options = {"critic_args": (-1.0,), "critic_kwargs": {"scale": charges}}
        value, gradient = gpk.value_and_input_gradient(energy, positions, **options)
        exact_value, exact = plain(lambda r: energy(r, -1.0, scale=charges), positions)
        torch.testing.assert_close(gpk.input_gradient(energy, positions, **options), exact)
        ours, other = ((-g - forces).square().mean() + v for v, g in ((value, gradient), (exact_value, exact)))
        torch.testing.assert_close(torch.autograd.grad(ours, charges), torch.autograd.grad(other, charges))


def test_backward_can_be_repeated_where_the_graph_is_kept() -> None:
    for make in (lambda: mlp(nn.Tanh()), WithFeatures):
        model, x = make(), torch.randn(4, 3, dtype=torch.float64)
        _, gradient = gpk.value_and_input_gradient(model, x)
        weights = list(model.parameters())
        first = torch.autograd.grad(gradient.square().sum(), weights, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(gradient.square().sum(), weights, allow_unused=True)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(gradient.square().sum(), weights, allow_unused=True)


def test_results_can_be_changed_in_place_and_weights_cannot() -> None:
    model, x = mlp(nn.Tanh()), torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):
        value, gradient = gpk.value_and_input_gradient(model, x)
        gradient *= 2
        value += 1
        exact_value, exact = plain(model, x)
        loss, other = gradient.square().sum() + value.square().sum(), (2 * exact).square().sum()
        other = other + (exact_value + 1).square().sum()
        for a, b in zip(*(torch.autograd.grad(u, list(model.parameters())) for u in (loss, other)), strict=True):
            torch.testing.assert_close(a, b)
        gradient = gpk.input_gradient(model, x)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient.square().sum().backward()


def test_a_further_derivative_raises_and_is_there_in_fast_double_backward() -> None:
    model, x = mlp(nn.Tanh()), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gradient = gpk.input_gradient(model, x)
    with pytest.raises(RuntimeError, match="fast_double_backward"):
        torch.autograd.grad(gradient.square().sum(), x, create_graph=True)
    found = []
    for way in (gpk.input_gradient, lambda model, x: plain(model, x)[1]):
        with gpk.fast_double_backward():
            (laplacian,) = torch.autograd.grad(way(model, x).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(laplacian.square().sum(), [x, *model.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_without_grad_mode_there_is_no_graph() -> None:
    model, x = mlp(nn.Tanh()), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        value, gradient = gpk.value_and_input_gradient(model, x)
    assert not value.requires_grad
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, plain(model, x)[1].detach())
    frozen = mlp(nn.Tanh()).requires_grad_(False)
    value, gradient = gpk.value_and_input_gradient(frozen, x)
    assert not value.requires_grad
    assert not gradient.requires_grad


def test_whether_there_is_a_graph_follows_each_call() -> None:
    """Calls of one graph share programs, but not where one has nothing to train."""
    model, x = mlp(nn.Softplus(2.0)), torch.randn(4, 3, dtype=torch.float64)
    exact = plain(model, x)[1].detach()
    for _ in range(4):
        for frozen, grad_mode, trains in itertools.product((False, True), repeat=3):
            model.requires_grad_(not frozen)
            with torch.set_grad_enabled(grad_mode):
                value, gradient = gpk.value_and_input_gradient(model, x.requires_grad_(trains))
            torch.testing.assert_close(gradient, exact)
            has_graph = grad_mode and (trains or not frozen)
            assert value.requires_grad == gradient.requires_grad == has_graph


@pytest.mark.parametrize("name", ["ReLU", "tanh", "softplus"])
def test_a_gradient_without_a_graph_makes_no_more_calls_than_pytorchs(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make().requires_grad_(False), torch.randn(shape, dtype=torch.float64)
    engine.known.clear()
    for _ in range(4):
        gpk.input_gradient(model, x)
    (signature,) = engine.known._entries.values()
    assert signature.program is not None
    made = [call for part in signature.program.parts for call in part.calls]
    x.requires_grad_()
    y = model(x)
    assert 0 < len(made) <= counted(lambda: torch.autograd.grad(y.sum(), x)).calls


@pytest.mark.parametrize("left", [False, True], ids=["by program", "left to autograd"])
def test_python_does_not_look_at_nodes(left: bool) -> None:
    """A call runs as many Python functions of this library for a deep model as for a shallow one."""
    x = torch.randn(4, 3)
    counts = []
    for depth in (1, 12):
        linear = [torch.randn(3, 3, requires_grad=True) for _ in range(depth)]

        def model(x: Tensor, linear: list[Tensor] = linear) -> Tensor:
            for w in linear:
                x = (x @ w).tanh()
            return x.sum(1)

        seen: list[str] = []

        def note(frame: Any, event: str, arg: object, seen: list[str] = seen) -> None:
            if event == "call" and "gpkernels" in frame.f_code.co_filename:
                seen.append(frame.f_code.co_name)

        if left:
            left_to_autograd.add(model, x.numel())
        for _ in range(4):
            gpk.input_gradient(model, x)
        sys.setprofile(note)
        try:
            gpk.input_gradient(model, x)
        finally:
            sys.setprofile(None)
        counts.append(len(seen))
    assert counts[0] == counts[1] <= 16


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "nested"])
def test_containers_of_inputs(kind: str) -> None:
    net = mlp(nn.Tanh(), 2)
    a, b = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    make: dict[str, Callable[[], Any]] = {
        "dict": lambda: {"b": b, "n": 2, "a": a, "none": None, "index": torch.arange(4)},
        "tuple": lambda: (a, b, torch.arange(4), None),
        "list": lambda: [a, b, 1.5],
        "nested": lambda: {"a": a, "more": [b]},
    }

    def model(x: Any) -> tuple[Tensor, Tensor, None]:
        if isinstance(x, dict):
            first, second = x["a"], x["b"] if "b" in x else x["more"][0]
        else:
            first, second = x[:2]
        assert first.requires_grad
        y = net(torch.cat([first, second], 1))
        return y[:, :1], y[:, 1:].detach(), None

    moved = [t.clone().requires_grad_() for t in (a, b)]
    exact = torch.autograd.grad(net(torch.cat(moved, 1))[:, :1].sum(), moved)
    for _ in range(4):
        x = make[kind]()
        (value, rest, nothing), gradient = gpk.value_and_input_gradient(model, x)
        assert value.requires_grad
        assert not rest.requires_grad
        assert nothing is None
        assert type(gradient) is type(x)
        found = tree_flatten(gradient)[0]
        entries = tree_flatten(x)[0]
        assert len(found) == len(entries)
        for g, entry in zip(found, entries, strict=True):
            if entry is a or entry is b:
                torch.testing.assert_close(g, exact[0 if entry is a else 1])
            else:
                assert g is None
        assert not a.requires_grad


def test_what_the_model_raises_comes_out_as_it_is() -> None:
    def model(x: Tensor) -> Tensor:
        raise KeyError("mine")

    before = torch.compiler.is_compiling(), getattr(private.compiler(), "_stance", None)
    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            gpk.input_gradient(model, torch.randn(2, 3))
    assert before == (torch.compiler.is_compiling(), getattr(private.compiler(), "_stance", None))


def test_hooks_on_saved_tensors_see_what_backward_needs() -> None:
    model, x = mlp(nn.Tanh()), torch.randn(4, 3, dtype=torch.float64)
    for _ in range(4):
        packed: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, p=packed: p.append(t.numel()) or t, lambda t: t):
            gradient = gpk.input_gradient(model, x)
        assert packed
        exact = plain(model, x)[1]
        weights = [w for w in model.parameters() if w.dim() > 1]
        for a, b in zip(*(torch.autograd.grad(g.square().sum(), weights) for g in (gradient, exact)), strict=True):
            torch.testing.assert_close(a, b)


def test_cotangents_may_be_a_batch() -> None:
    model, x = mlp(nn.Tanh()), torch.randn(4, 3, dtype=torch.float64)
    weights = [w for w in model.parameters() if w.dim() > 1]
    cotangents = torch.randn(2, 4, 3, dtype=torch.float64)
    for _ in range(4):
        found = []
        for g in (gpk.input_gradient(model, x), plain(model, x)[1]):
            found.append(torch.autograd.grad(g, weights, cotangents, is_grads_batched=True))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_a_forced_backend_is_asked_for_in_both_halves() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    weights = list(model.parameters())
    found = []
    for backend in ("auto", "auto", "auto", "auto", "reference", "auto"):
        with gpk.backend(backend):
            gradient = gpk.input_gradient(model, x)
            found.append(torch.autograd.grad(gradient.square().sum(), weights, allow_unused=True))
    for again in found[1:]:
        torch.testing.assert_close(again, found[0])


def test_hooks_are_called() -> None:
    model, x = mlp(nn.Tanh()), torch.randn(4, 3, dtype=torch.float64)
    seen = []
    model[0].register_full_backward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        gradient = gpk.input_gradient(model, x)
        exact = plain(model, x)[1]
        torch.testing.assert_close(gradient, exact)
        for a, b in zip(
            torch.autograd.grad(gradient.square().sum(), list(model.parameters()), allow_unused=True),
            torch.autograd.grad(exact.square().sum(), list(model.parameters()), allow_unused=True),
            strict=True,
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert seen


@pytest.mark.parametrize("way", ["vmap", "grad", "jacrev", "jvp"])
def test_transforms(way: str) -> None:
    model, x = mlp(nn.Tanh()), torch.randn(4, 3, dtype=torch.float64)
    if way == "vmap":
        found = torch.func.vmap(lambda x: gpk.input_gradient(model, x))(x)
        torch.testing.assert_close(found, plain(model, x)[1])
    elif way == "grad":
        found = torch.func.grad(lambda x: gpk.input_gradient(model, x).square().sum())(x)
        x = x.requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(plain(model, x)[1].square().sum(), x)[0])
    elif way == "jacrev":
        found = torch.func.jacrev(lambda x: gpk.value_and_input_gradient(model, x)[1])(x[0])
        torch.testing.assert_close(found, torch.func.hessian(lambda x: model(x).sum())(x[0]))
    else:
        t = torch.randn_like(x)
        _, found = torch.func.jvp(lambda x: gpk.input_gradient(model, x), (x,), (t,))
        exact = torch.func.jvp(torch.func.grad(lambda x: model(x).sum()), (x,), (t,))[1]
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("backend", ["aot_eager", "gpkernels"])
@pytest.mark.parametrize("name", ["ReLU", "tanh", "features, a custom function"])
def test_compiled(name: str, backend: str) -> None:
    make, shape = MODELS[name]
    for trains in (False, True):
        torch._dynamo.reset()
        model = make()
        x = torch.randn(shape, dtype=torch.float64)
        loss = lambda way, x, model=model: LOSSES["of both"](*way(model, x))  # noqa: E731
        ours_of = lambda x, loss=loss: loss(gpk.value_and_input_gradient, x)  # noqa: E731
        step = torch.compile(ours_of, backend=backend, fullgraph=True)
        for _ in range(3):
            x = x.detach().clone().requires_grad_(trains)
            leaves = [*model.parameters(), *([x] if trains else [])]
            ours, exact = step(x), loss(plain, x)
            torch.testing.assert_close(ours, exact)
            ours_at, exact_at = (torch.autograd.grad(u, leaves, allow_unused=True) for u in (ours, exact))
            for a, b in zip(ours_at, exact_at, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_tangents_of_weights_reach_both_results(trains: bool, graph: bool) -> None:
    x, weight, along = (torch.randn(n, 6).double() for n in (5, 6, 6))

    def both(weight: Tensor) -> tuple[Tensor, Tensor]:
        return gpk.value_and_input_gradient(lambda x: torch.tanh(x @ weight).sum(1), x)

    _, exact = torch.func.jvp(both, (weight,), (along,))
    with forward_ad.dual_level(), torch.set_grad_enabled(graph):
        results = both(forward_ad.make_dual(weight.clone().requires_grad_(trains), along))
        tangents = tuple(forward_ad.unpack_dual(result).tangent for result in results)
    torch.testing.assert_close(tangents, exact)


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(4, 3)
    model = nn.Linear(3, 1)
    with pytest.raises(TypeError, match="model: expected a module or a callable, got int"):
        gpk.input_gradient(3, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x: expected a dense floating-point tensor, got torch.int64"):
        gpk.input_gradient(model, torch.arange(3))
    with pytest.raises(
        TypeError, match="x: expected a floating-point tensor, or a tuple, list or dict of them, got tuple"
    ):
        gpk.input_gradient(model, ())
    with pytest.raises(ValueError, match=r"model: expected scores that depend on the input"):
        gpk.input_gradient(lambda x: torch.ones(3), x)
    with pytest.raises(ValueError, match=r"model: expected scores that depend on the input"):
        gpk.input_gradient(lambda x: model.weight.sum(), x)
    with pytest.raises(TypeError, match="model: expected scores as a tensor, or first in a tuple, got str"):
        gpk.input_gradient(lambda x: "no", x)


@pytest.mark.parametrize("name", ["gradient", "penalty", "loss"])
def test_inference_mode_is_named_as_the_reason(name: str) -> None:
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    calls = {
        "gradient": lambda: gpk.input_gradient(model, x),
        "penalty": lambda: gpk.r1_penalty(model, x),
        "loss": lambda: gpk.CriticLoss(model)(x, x),
    }
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.* use torch.no_grad"):
        calls[name]()


def test_no_model_is_kept_alive() -> None:
    import gc
    import weakref

    model = mlp(nn.Tanh())
    for _ in range(3):
        gpk.input_gradient(model, torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
