"""Programs: when they are created and used, what they retain, and how they react to changes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gpkernels as gpk
from comparing import assert_exactly_as, assert_same, batch, gradients
from critics import mlp, plain_loss, plain_penalty, plain_points
from gpkernels import backends
from gpkernels.bench.counts import peak
from gpkernels.bench.small import SMALL
from gpkernels.critic import program, run, slots
from watchers import PassesFunctions, PassesOps

N, WIDTH = 5, 6


@pytest.fixture(autouse=True)
def _anew() -> None:
    """Clear all signatures."""
    run.forget()


def programs() -> list[program.Program | None]:
    return [signature.program for signature in program.signatures._entries.values()]


def penalise(critic: Any, n: int = N) -> None:
    """Compare a penalty with plain PyTorch's."""
    real, fake, eps = batch(n, WIDTH)
    points = plain_points(real, fake, eps, "wgan-gp")
    assert_exactly_as(gpk.gradient_penalty(critic, real, fake, eps=eps), plain_penalty(critic, points), critic)


def test_a_signature_that_is_met_twice_has_a_program(loop: str) -> None:
    critic = mlp(WIDTH, 8, 1).double()
    for count in (0, 1, 1, 1):
        penalise(critic)
        assert len(program.signatures) == 1
        assert sum(p is not None for p in programs()) == count


def test_critics_of_one_signature_share_a_program(loop: str) -> None:
    for _ in range(4):
        penalise(mlp(WIDTH, 8, 1).double())
    assert len(program.signatures) == 1


def test_another_size_shape_or_frozen_weight_is_another_signature(loop: str) -> None:
    critic = mlp(WIDTH, 8, 8, 1).double()
    penalise(critic)
    penalise(critic, N + 1)
    critic[2].weight.requires_grad_(False)
    penalise(critic)
    critic[1] = nn.LeakyReLU(0.1)
    penalise(critic)
    critic[1] = nn.LeakyReLU(0.3)
    penalise(critic)
    assert len(program.signatures) == 5


def test_tied_weights_are_told_from_equal_ones(loop: str) -> None:
    critic = mlp(WIDTH, 8, 8, 8, 1, activation=nn.Tanh).double()
    for _ in range(3):
        penalise(critic)
    critic[4].weight = critic[2].weight
    for _ in range(3):
        penalise(critic)


def test_only_the_latest_signatures_are_kept(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.signatures, "capacity", 3)
    critic = mlp(WIDTH, 8, 1).double()
    for n in (1, 2, 3, 4, 5, 4, 1, 1, 1, 2):
        penalise(critic, n)
        assert len(program.signatures) <= 3


def test_programs_hold_no_tensors(loop: str) -> None:
    def used() -> list[weakref.ref[Any]]:
        critic = mlp(WIDTH, 8, 1).double()
        refs: list[weakref.ref[Any]] = [weakref.ref(critic), *(weakref.ref(p) for p in critic.parameters())]
        for _ in range(4):
            real, fake, _ = batch(N, WIDTH)
            refs += [weakref.ref(real), weakref.ref(fake)]
            gpk.gradient_penalty(critic, real, fake)
        return refs

    refs = used()
    gc.collect()
    assert any(p is not None for p in programs())
    assert [ref() for ref in refs] == [None] * len(refs)


class Sine(nn.Module):
    """Saves a number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


@pytest.mark.parametrize("activation", [nn.ReLU, Sine])
@pytest.mark.parametrize("watcher", [PassesOps, PassesFunctions])
def test_who_looks_on_sees_the_same_numbers(watcher: Any, activation: Any, loop: str) -> None:
    critic = mlp(WIDTH, 8, 1, activation=activation).double()
    for watched in (False, True, False, False, True, False):
        real, fake, eps = batch(N, WIDTH)
        exact = plain_loss(critic, real, fake, eps)
        loss = gpk.CriticLoss(critic)
        if watched:
            with watcher():
                ours = loss(real, fake, eps=eps).loss
        else:
            ours = loss(real, fake, eps=eps).loss
        assert_exactly_as(ours, exact, critic)


def test_a_forced_backend_runs_no_program() -> None:
    critic = mlp(WIDTH, 8, 1).double()
    with gpk.backend("reference"):
        for _ in range(3):
            penalise(critic)
    assert all(p is None for p in programs())


class Fickle(torch.autograd.Function):
    """Custom function whose backward returns a gradient for its second argument in some calls only."""

    gives = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.sin() * w

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        x, w = ctx.saved_tensors
        return cotangent * x.cos() * w, cotangent * x.sin() if Fickle.gives else None


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.top, self.scale = nn.Linear(WIDTH, 8), nn.Linear(8, 1), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.top(Fickle.apply(h, self.scale.expand_as(h)).tanh())


def test_a_call_outside_that_gives_something_else_is_seen(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = Changing().double()
    loss = gpk.CriticLoss(critic, together=False)
    for gives in (True, True, True, False, False, False, True, True):
        monkeypatch.setattr(Fickle, "gives", gives)
        real, fake, eps = batch(N, WIDTH)
        exact, ours = plain_loss(critic, real, fake, eps), loss(real, fake, eps=eps).loss
        torch.testing.assert_close(ours, exact)
        assert_same(gradients(ours, critic), gradients(exact, critic))


def test_threads_may_share_a_critic(loop: str) -> None:
    critic = mlp(WIDTH, 8, 8, 1).double()
    batches = [batch(N, WIDTH) for _ in range(4)]
    wanted = [gradients(plain_loss(critic, r, f, e), critic) for r, f, e in batches]
    loss = gpk.CriticLoss(critic)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(10):
                real, fake, eps = batches[i]
                assert_same(gradients(loss(real, fake, eps=eps).loss, critic), wanted[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_other_memory_layouts_and_dtypes_are_seen(loop: str) -> None:
    critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(64, 1)).double()
    loss = gpk.CriticLoss(critic, objective="gan")
    for call in range(9):
        real, fake, eps = batch(N, 2, 6, 6)
        if call % 3:
            real, fake = (x.to(memory_format=torch.channels_last) for x in (real, fake))
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps, "gan"), critic)
    critic.float()
    for _ in range(4):
        real, fake, eps = batch(N, 2, 6, 6, dtype=torch.float32)
        exact = plain_loss(critic, real, fake, eps, "gan")
        assert_exactly_as(loss(real, fake, eps=eps).loss, exact, critic, 1e-4)


STEPS: dict[str, tuple[Any, str]] = {
    "one batch": (lambda: mlp(WIDTH, 8, 1), "wgan-gp"),
    "a critic that bends": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1)), "wgan-gp"),
    "apart": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)), "wgan-gp"),
    "R1": (lambda: mlp(WIDTH, 8, 1), "r1"),
    "no penalty": (lambda: mlp(WIDTH, 8, 1), "none"),
}


@pytest.mark.skipif(backends.program is None, reason="the loop in C++ is not built")
@pytest.mark.parametrize("kind", STEPS)
def test_a_settled_step_is_one_call_of_cpp(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, penalty = STEPS[kind]
    critic = make().double()
    loss = gpk.CriticLoss(critic, penalty=penalty)
    for settled in (False,) * 6 + (True,):
        if settled:  # the Python path is unavailable

            def gone(*_: Any, **__: Any) -> None:
                raise AssertionError("not in C++")

            monkeypatch.setattr("gpkernels.losses.critic_step", gone)
            monkeypatch.setattr("gpkernels.critic.step.made", gone)
        real, fake, eps = batch(N, WIDTH)
        ours = loss(real, fake, eps=eps if penalty == "wgan-gp" else None).loss
        exact = plain_loss(critic, real, fake, eps, penalty=penalty)
        torch.testing.assert_close(ours, exact)
        assert_same(gradients(ours, critic), gradients(exact, critic))
    if penalty != "none":
        points = plain_points(real, fake, eps, penalty)
        for _ in range(3):
            monkeypatch.undo()
            gpk.r1_penalty(critic, points)
        monkeypatch.setattr("gpkernels.critic.step.made", gone)
        torch.testing.assert_close(gpk.r1_penalty(critic, points), plain_penalty(critic, points, 0.0))


def _with(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 9), nn.Unflatten(1, (1, 3, 3)), layer, nn.Flatten(), nn.Linear(9, 1)).double()


@pytest.mark.parametrize(
    "layers",
    [
        [nn.LeakyReLU(0.1), nn.LeakyReLU(0.3)],
        [nn.Softplus(1, 20), nn.Softplus(2, 20), nn.Softplus(1, 0.1)],
        [nn.Conv2d(1, 1, 3, padding=p, dilation=p) for p in (1, 2)],
        [nn.LayerNorm([3, 3]), nn.Sequential(nn.Flatten(2), nn.LayerNorm(9), nn.Unflatten(2, (3, 3)))],
    ],
    ids=["leaky slopes", "softplus", "dilation", "normalised axes"],
)
def test_critics_that_differ_in_a_constant_alone_have_programs_of_their_own(layers: list[nn.Module]) -> None:
    critics = [_with(layer) for layer in layers]
    for critic in critics[1:]:
        critic.load_state_dict(critics[0].state_dict(), strict=False)
    real, fake, eps = batch(4, 9)
    for _ in range(4):
        for critic in critics:
            ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
            exact = plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"))
            assert_same(gradients(ours, critic), gradients(exact, critic))


def test_a_program_is_of_indices_that_count_the_rows_or_not(loop: str) -> None:
    body = mlp(8, 16, 16, 4).double()

    def critic(x: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        return body(x)[rows, labels]

    loss, rows = gpk.CriticLoss(critic, objective="gan", penalty="r1"), torch.arange(6)
    real, fake, _ = batch(6, 8)
    for own in [rows, rows, rows.flip(0), rows, rows.flip(0), rows.flip(0), torch.zeros_like(rows), rows]:
        args = own, torch.randint(4, (6,))
        ours = loss(real, fake, critic_args=args).loss
        exact = plain_loss(lambda x, args=args: critic(x, *args), real, fake, torch.empty(0), "gan", "r1")
        assert_exactly_as(ours, exact, body)


def test_writes_that_nothing_reads_are_dropped() -> None:
    x = torch.randn(4)
    recorder = program.Recorder([x], cheaply=False)
    with torch.no_grad(), recorder:
        x.sin().neg_()
        z = x * 2
        z.view(2, 2).add_(1)
    made = program.Program.of(recorder, [z])
    (stretch,) = made.parts
    assert [call[0]._overloadpacket for call in stretch.calls] == [
        torch.ops.aten.mul,
        torch.ops.aten.view,
        torch.ops.aten.add_,
    ]
    (again,) = made.run([x], lambda what, given: [])
    assert torch.equal(again, z)


def held(calls: list[Any], kept: set[Any], sizes: dict[Any, int], given: list[Any]) -> int:
    """Return the most bytes that a run holds at a time, if all is freed after its last use. given: its inputs."""
    homes = slots.homes_of(calls)
    last: dict[Any, int] = {}
    for i, call in enumerate(calls):
        last.update((homes.get(s, s), i) for s in (*slots.slots_read(call), *slots.slots_made(call)))
    last.update((homes.get(s, s), len(calls)) for s in kept)
    alive = {s: sizes[s] for s in given}
    most = sum(alive.values())
    for i, call in enumerate(calls):
        alive.update((s, sizes[s]) for s in slots.slots_made(call) if s not in homes)
        most = max(most, sum(alive.values()))
        alive = {s: size for s, size in alive.items() if last.get(s, -1) > i}
    return most


def test_an_input_that_nothing_reads_is_freed_at_once(loop: str) -> None:
    x, unread = torch.randn(1000), torch.randn(100_000)
    recorder = program.Recorder([x, unread])
    with recorder:
        y = torch.cat([x] * 100)
    made = program.Program.of(recorder, [y])
    found = peak(lambda: made.run([x.clone(), unread.clone()], lambda *_: []), torch.device("cpu"))
    assert found < 1.1 * (x.nbytes + unread.nbytes)


def test_weight_gradients_are_computed_where_what_they_need_can_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[tuple[int, int, int]] = []
    early = program.early

    def noted(calls: list[Any], kept: set[Any], sizes: dict[Any, int]) -> list[Any]:
        found = early(calls, kept, sizes)
        given = slots.inputs_of(calls)
        before, after = (held(order, kept, sizes, given) for order in (calls, found))
        peaks.append((sum(sizes[s] for s in given), before, after))
        return found

    monkeypatch.setattr(program, "early", noted)
    model = mlp(3, *[16] * 8, 1, activation=nn.Softplus)
    x, weights = torch.randn(512, 3), list(model.parameters())
    for _ in range(3):
        value, gradient = gpk.value_and_input_gradient(model, x)
        loss = (gradient.norm(dim=1) - 1).square().mean() + value.abs().mean()
        torch.autograd.grad(loss, weights)
    given, before, after = peaks[-1]  # of the backward half
    assert before > 1.6 * given
    assert after < 1.2 * given


def test_calls_move_past_what_does_not_concern_them() -> None:
    a, b, c = (torch.randn(4, 4) for _ in range(3))
    recorder = program.Recorder([a, b, c])
    with recorder:
        doubled = a * 2
        noise = torch.rand_like(doubled)
        sums = doubled @ b
        b.mul_(3)
        late = (sums + noise).sum()  # frees both, but after what writes neither
        kept = b.t() @ c
    calls = program.early(recorder.calls, {recorder.slot(x) for x in (late, kept)}, recorder.facts.sizes)
    names = [call[0]._schema.name.removeprefix("aten::") for call in calls]
    assert names == ["mul", "rand_like", "mm", "add", "sum", "mul_", "t", "mm"]
    own = [x.clone() for x in (a, b / 3, c)]
    torch.manual_seed(0)
    made = program.Program.of(recorder, [late, kept]).run(list(own), lambda *_: [])
    torch.manual_seed(0)
    first = a * 2
    expected = (first @ (b / 3) + torch.rand_like(first)).sum()
    torch.testing.assert_close(made, [expected, b.t() @ c])


def test_what_is_held_for_the_last_pass_anyway_is_not_held_twice() -> None:
    x, y, z = (torch.randn(64, 64) for _ in range(3))
    recorder = program.Recorder([x, y, z])
    with recorder:
        slope = x.sigmoid()
        curvature = slope * slope - slope
        first = y @ z
        most = torch.cat([first] * 4).sum()
        second = first * slope  # the last to read the slope
        third = second.mm(first)
        noise = torch.rand_like(third)  # drawn where it was
        fourth = curvature.mul(third) + noise
        y.mul_(2)
        fifth = fourth.sum() + z.sum() + most
    calls = program.late(recorder.calls, {recorder.slot(fifth)}, recorder.facts.sizes)
    names = [call[0]._schema.name.removeprefix("aten::") for call in calls]
    assert names[:7] == ["mm", "cat", "sum", "sigmoid", "mul", "sub", "mul"]
    assert names.index("rand_like") == names.index("mul_") - 3
    given = slots.inputs_of(recorder.calls)
    before, after = (
        held(order, {recorder.slot(fifth)}, recorder.facts.sizes, given) for order in (recorder.calls, calls)
    )
    assert after < before


@pytest.mark.parametrize("kind", ["gradient", "penalty", "loss"])
@pytest.mark.parametrize(
    "name", ["residual GroupNorm, N 2", "tanh, N 64", "LSTM, N 4", "CTGAN packs, N 10", "sine, N 64"]
)
def test_no_more_is_held_than_in_the_given_order(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: dict[str, bool] = {}

    def checked(which: str) -> Callable[..., list[Any]]:
        move = getattr(program, which)

        def noted(calls: list[Any], kept: set[Any], sizes: dict[Any, int]) -> list[Any]:
            found, given = move(calls, kept, sizes), slots.inputs_of(calls)
            moved[which] = moved.get(which, False) or any(a is not b for a, b in zip(calls, found, strict=True))
            for held_by_caller in ([], given):
                before, after = (held(order, {*kept, *held_by_caller}, sizes, given) for order in (calls, found))
                assert after <= before
            return found

        return noted

    for which in ("early", "late"):
        monkeypatch.setattr(program, which, checked(which))
    critic = SMALL[name].make()
    for _ in range(4):
        real, fake = (torch.randn(SMALL[name].shape) for _ in range(2))
        if kind == "loss":
            gpk.CriticLoss(critic)(real, fake).loss.backward()
        elif kind == "penalty":
            gpk.gradient_penalty(critic, real, fake).backward()
        else:
            value, gradient = gpk.value_and_input_gradient(critic, real)
            (value.mean() + gradient.square().sum()).backward()
    assert moved["early"]
    assert moved["late"]


CALLS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x + y,
    lambda x, y: x @ y,
    lambda x, y: x.t(),
    lambda x, y: x[:, :],
    lambda x, y: x.mul_(0.5),
    lambda x, y: x.tanh(),
    lambda x, y: x * y,
    lambda x, y: torch.addmm(x, x, y),
    lambda x, y: torch.addmm(x, y, y),
    lambda x, y: torch.addcmul(x, x, y),
    lambda x, y: x.contiguous(),
    lambda x, y: torch.cat([x[:1], y[1:]]),
]


@pytest.mark.parametrize("seed", range(40))
def test_any_order_and_memory_that_results_gives_the_same(seed: int, loop: str) -> None:
    random = torch.Generator().manual_seed(seed)
    given = [torch.randn(3, 3, generator=random, dtype=torch.float64) for _ in range(3)]
    recorder = program.Recorder(given, cheaply=False)
    numbers = torch.randint(0, 2**31, (40, 3), generator=random).tolist()
    alive: list[Tensor] = list(given)
    with recorder:
        for kind, i, j in numbers:
            x, y = alive[i % len(alive)], alive[j % len(alive)]
            made = CALLS[kind % len(CALLS)](x, y)
            if not any(made is x for x in alive):
                alive.append(made)
            if len(alive) > 5:
                alive.pop(0)
    again = torch.Generator().manual_seed(seed)
    own = [torch.randn(3, 3, generator=again, dtype=torch.float64) for _ in range(3)]
    for got, expected in zip(program.Program.of(recorder, alive).run(list(own), lambda *_: []), alive, strict=True):
        assert torch.equal(got, expected)
    assert all(map(torch.equal, own, given))  # as far as the calls wrote to them


def test_running_statistics_are_written_though_the_schema_does_not_say_so() -> None:
    def normalised(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ x
        normal = nn.functional.batch_norm(x, mean, var, training=True)
        late = product + mean  # frees the product
        nn.functional.batch_norm(normal, mean, var, training=True)
        return normal, late * mean

    def given() -> list[Tensor]:
        return [torch.arange(16.0).view(4, 4).sin(), torch.zeros(4), torch.ones(4)]

    first, again, expected = given(), given(), given()
    recorder = program.Recorder(first, cheaply=False)
    with torch.no_grad(), recorder:
        results = normalised(*first)
    made = program.Program.of(recorder, results).run(list(again), lambda *_: [])
    for got, wanted in zip([*made, *again], [*normalised(*expected), *expected], strict=True):
        assert got is not None
        assert torch.equal(got, wanted)


def arithmetic(x: Tensor) -> Tensor:
    return (x * 0.1 + 3).div(0.7).sub(x, alpha=0.3)


def with_integers(x: Tensor) -> Tensor:
    n = torch.arange(64)
    return arithmetic(x) + n * 0.3 + (n + 2)


@pytest.mark.parametrize("call", [arithmetic, with_integers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_those_of_pytorch(dtype: torch.dtype, call: Callable[[Tensor], Tensor], loop: str) -> None:
    x = torch.randn(64).to(dtype)
    recorder = program.Recorder([x])
    with recorder:
        expected = call(x)
    made = program.Program.of(recorder, [expected])
    for _ in range(2):
        (found,) = made.run([x], lambda *_: [])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if loop == "C++" and dtype == torch.float32 and call is arithmetic:
        counts = []
        for run_it in (lambda: arithmetic(x), lambda: made.run([x], lambda *_: [])):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run_it()
            counts.append(sum(event.name == "aten::_to_copy" for event in seen.events()))
        assert counts[0] > 0
        assert counts[1] == 0  # numbers were converted with the program
