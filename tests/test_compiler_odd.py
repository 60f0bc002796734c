"""`torch.compile(backend="gpkernels")` of odd programs: what eager PyTorch gives, or its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpkernels.compiler import as_program

pytestmark = pytest.mark.usefixtures("compiler_anew")
Call = Callable[..., Any]
Act = Callable[[Call, int], Sequence[Tensor | None]]
TURNS = 3


def results(f: Call, act: Act, turn: int) -> tuple[Any, ...]:
    """What an act with a function gives from a seed, or the name of its error, and the state of the random numbers."""
    torch.manual_seed(turn)
    try:
        found = [None if x is None else x.detach().clone() for x in act(f, turn)]
    except RuntimeError as error:
        return [], type(error).__name__
    return found, torch.get_rng_state()


def assert_as_eager(function: Call, act: Act, **options: Any) -> None:
    """The same from a function and from its compiled form, recorded in the first turn and replayed in later ones."""
    call = torch.compile(function, backend="gpkernels", **options)
    for turn in range(TURNS):
        ours, exact = (results(f, act, turn) for f in (call, function))
        assert isinstance(ours[1], str) == isinstance(exact[1], str), (ours, exact)
        if isinstance(exact[1], str):
            assert ours[1] == exact[1]
        else:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def normal(*shape: int, leaf: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=leaf)


def gradients(loss: Tensor, *leaves: Tensor, again: bool = False) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=again)


# --- several outputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_weight_that_an_output_does_not_use_has_no_gradient_from_it(which: int) -> None:
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        h = a(x)
        return h.sum(), b(h).square().sum(), h.square().sum()

    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        losses = f(normal(2, 3))
        one = gradients(losses[which], *a.parameters(), *b.parameters(), again=True)
        return *one, *gradients(losses[0] + losses[which], *a.parameters(), *b.parameters())

    assert_as_eager(step, act)


def test_an_infinite_slope_of_another_output_gives_no_nan() -> None:
    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        return gradients(f(x)[1], x)

    assert_as_eager(lambda x: (x.sqrt().sum(), x.sum()), act)


def test_losses_with_graphs_of_their_own_are_differentiated_one_after_the_other() -> None:
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        first, second = f(normal(2, 3))
        return *gradients(first, *a.parameters()), *gradients(second, *b.parameters())

    assert_as_eager(lambda x: (a(x).square().sum(), b(x).square().sum()), act)


def test_a_graph_that_is_not_retained_is_gone() -> None:
    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = normal(3)
        loss = f(x)
        loss.backward()
        loss.backward()
        return ()

    assert_as_eager(lambda x: x.exp().sum(), act)


@pytest.mark.parametrize("outputs", [1, 2])
def test_batched_cotangents(outputs: int) -> None:
    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = normal(4)
        return torch.autograd.grad(f(x)[0], x, torch.eye(2).double(), is_grads_batched=True)

    assert_as_eager(lambda x: (torch.stack([x.sin().sum(), (x * x).sum()]), x * 2)[:outputs], act)


# --- memory that is shared --------------------------------------------------------------------------------------------


VIEWS: dict[str, Call] = {
    "of an input": lambda x: (x.view(-1),),
    "of a result": lambda x: (lambda y: (y, y[1:]))(x * 2),
    "of what is not returned": lambda x: (lambda y: (y[:3], y[1:]))(x * 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_follow_what_is_written_to_each_other(name: str) -> None:
    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        leaf = normal(4, 3)
        x = leaf * 1
        found = f(x)
        found[0].mul_(3)
        return x, *found, *gradients(x.square().sum() + found[-1].square().sum(), leaf)

    assert_as_eager(VIEWS[name], act)


def test_a_buffer_to_which_a_loss_is_added_has_its_gradient() -> None:
    weight = normal(3)

    def step(total: Tensor, x: Tensor) -> Tensor:
        total.add_((weight * x).sum())
        return x * 2

    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        total = torch.zeros((), dtype=torch.float64)
        found = f(total, normal(3, leaf=False))
        return found, total, *gradients(total, weight)

    assert_as_eager(step, act)


def test_what_cannot_be_differentiated_may_be_computed() -> None:
    def step(x: Tensor, total: Tensor) -> Tensor:
        y = x * total
        total.add_(1)
        return y

    def act(f: Call, turn: int, differentiate: bool) -> Sequence[Tensor | None]:
        x, total = normal(3), normal(3, leaf=False)
        y = f(x, total)
        return gradients(y.sum(), x) if differentiate else (y, total)

    for differentiate in (False, True):
        assert_as_eager(step, partial(act, differentiate=differentiate))


@pytest.mark.parametrize("what", ["weight", "input", "output"])
def test_a_change_of_what_the_backward_pass_needs_a_view_of_is_an_error(what: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        return y, net((x if what == "input" else y).view(2, 4)).square().sum()

    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = normal(8, leaf=False)
        y, loss = f(x)
        with torch.no_grad():
            {"weight": net[1].weight, "input": x, "output": y}[what].mul_(2)
        return gradients(loss, *net.parameters())

    assert_as_eager(step, act)


def test_views_as_another_dtype() -> None:
    assert_as_eager(
        lambda x: (x.view(torch.int32) + 1, x.view(torch.int64) > 0), lambda f, turn: f(normal(3, leaf=False))
    )


def test_a_place_in_the_storage_of_an_input() -> None:
    assert_as_eager(
        lambda x: x.as_strided((2,), (1,), 1) * 2, lambda f, turn: [f(normal(10, leaf=False)[turn : turn + 4])]
    )


def test_leaves_that_the_graph_makes() -> None:
    run = as_program(lambda x: (torch.ones(3, requires_grad=True), x * 2), [torch.ones(3)])
    for _ in range(TURNS):
        leaf, _ = run(torch.ones(3, requires_grad=True))
        leaf.sum().backward()
        assert leaf.is_leaf
        assert leaf.grad is not None


# --- random numbers, checks and branches ------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [lambda x: torch.rand(5), lambda x: F.dropout(x, 0.3)])
def test_random_numbers_that_nobody_uses_are_drawn(drawn: Callable[[Tensor], Tensor]) -> None:
    def step(x: Tensor) -> Tensor:
        drawn(x)
        return F.dropout(x, 0.5)

    assert_as_eager(step, lambda f, turn: [f(torch.ones(20, dtype=torch.float64))])


def test_random_numbers_of_a_backward_pass() -> None:
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent * torch.rand_like(cotangent)

    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = normal(3)
        y = f(x)
        return y, torch.rand(2), *gradients(y.sum(), x)

    assert_as_eager(lambda x: Noisy.apply(x), act)


CHECKED: dict[str, Call] = {
    "inv": torch.linalg.inv,
    "cholesky": torch.linalg.cholesky,
    "solve": lambda x: torch.linalg.solve(x, torch.ones(3, 2, dtype=torch.float64)),
    "assert": lambda x: (torch._assert_async((x.trace() > 0).all()), x * 2)[1],
}


@pytest.mark.parametrize("name", CHECKED)
def test_checks_of_values_are_made_in_every_call(name: str) -> None:
    sign = [1.0, 2.0, -1.0 if name in ("cholesky", "assert") else 0.0]
    assert_as_eager(CHECKED[name], lambda f, turn: [f(torch.eye(3, dtype=torch.float64) * sign[turn])])


def test_a_branch_by_a_value() -> None:
    def step(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = (torch.ones(3, dtype=torch.float64) * (1 - 2 * (turn % 2))).requires_grad_()
        y = f(x)
        return y, *gradients(y.sum(), x)

    assert_as_eager(step, act)


def test_as_many_results_as_a_mask_has() -> None:
    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = normal(6)
        y = f(x)
        return y, *gradients(y, x)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_as_eager(lambda x: (x[x > 0] * 2).sum(), act)


def test_sparse_results_run_as_they_are() -> None:
    run = as_program(lambda x: ((x * 2).to_sparse(),), [torch.ones(3)])
    for turn in range(TURNS):
        x = torch.full((3,), float(turn))
        torch.testing.assert_close(run(x)[0], (x * 2).to_sparse())


def test_complex_inputs_run_as_they_are() -> None:
    run = as_program(lambda x: (torch.linalg.pinv(x), x.real * 2), [torch.ones(3, 3)])
    for _ in range(TURNS):
        x = torch.randn(3, 3, dtype=torch.complex128)
        for got, expected in zip(run(x), (torch.linalg.pinv(x), x.real * 2), strict=True):
            torch.testing.assert_close(got, expected)


def _saved(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpointed_regions_repeat_their_masks(selective: bool, p: float) -> None:
    net = nn.Linear(4, 4).double()
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _saved)} if selective else {}

    def region(x: Tensor) -> Tensor:
        h = net(x)
        return F.dropout(h, p).sin() if p else h.sin()

    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        x = normal(3, 4)
        y = f(x)
        return y, *gradients(y, x, *net.parameters())

    assert_as_eager(lambda x: checkpoint(region, x, use_reentrant=False, **options).sum(), act)  # type: ignore[arg-type]


def test_an_activation_that_a_checkpointed_region_writes_to() -> None:
    def act(f: Call, turn: int) -> Sequence[Tensor | None]:
        leaf = normal(4)
        x = leaf * 1
        y = f(x)
        return x, y, *gradients(x.sum(), leaf)

    assert_as_eager(lambda x: checkpoint(lambda x: x.mul_(2).sin(), x, use_reentrant=False).sum(), act)


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_autograd(compiled: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    loss = lambda x: net(x).square().mean()  # noqa: E731
    call = torch.compile(loss, backend="gpkernels") if compiled else loss
    for turn in range(TURNS):
        x = normal(4 + turn % 2, 4, leaf=False)
        exact = gradients(loss(x), *net.parameters())
        net.zero_grad()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="gpkernels")):
            call(x).backward()
        torch.testing.assert_close([p.grad for p in net.parameters()], [*exact])
