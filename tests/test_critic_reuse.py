"""Results of a program in the memory of arguments that nothing reads any more: where, and where not.

That is so in the loop in C++; without it the tests compare what was recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_exactly_as, batch
from critics import mlp, plain_loss
from gpkernels import backends
from gpkernels.bench.small import SMALL
from gpkernels.critic import program, run
from gpkernels.critic.reuse import reusing
from gpkernels.critic.slots import Slot

aten = torch.ops.aten
Work = Callable[..., Sequence[Tensor]]


def recorded(work: Work, given: list[Tensor]) -> tuple[program.Program, Sequence[Tensor]]:
    recorder = program.Recorder(given, cheaply=False)
    with torch.no_grad(), recorder:
        results = work(*given)
    return program.Program.of(recorder, results), results


def written_over(made: program.Program) -> list[Any]:
    """Return the operations of a program that write to an argument which the recorded call does not."""
    found = []
    for part in made.parts:
        if isinstance(part, program.Stretch):
            written = reusing(part.calls, part.outputs, part.facts.places)
            found += [a[0].overloadpacket for a, b in zip(written, part.calls, strict=True) if a is not b]
    return found


def assert_reuses(work: Work, given: list[Tensor], *expected: Any) -> None:
    """Compare a program with the calls that it was recorded from, and its writes with those expected."""
    made, _ = recorded(work, given)
    assert written_over(made) == list(expected)
    for _ in range(2):
        fresh = [torch.randn_like(x) for x in given]
        own = [x.clone() for x in fresh]
        results = work(*[x.clone() for x in fresh])
        for got, wanted in zip(made.run(list(own), lambda *_: []), results, strict=True):
            assert torch.equal(got, wanted)  # type: ignore[arg-type]
        assert all(map(torch.equal, own, fresh))


def given(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes or [(3, 4), (3, 4)]]


def test_an_elementwise_call_writes_over_what_it_reads_last() -> None:
    def work(x: Tensor, y: Tensor) -> list[Tensor]:
        z = x * y
        return [(z + x).sin().mul(2).sub(y, alpha=3)]

    assert_reuses(work, given(), aten.add, aten.sin, aten.mul, aten.sub)


def test_any_argument_may_be_the_one() -> None:
    def work(x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.addcmul(x, y, x.exp()), x - y.cos() * 2, torch.where(x > 0, y, x.sin())]

    assert_reuses(work, given(), aten.addcmul, aten.mul, aten.sub, aten.where)


def test_slopes_write_over_cotangents() -> None:
    def work(x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            aten.threshold_backward(x * 1, y, 0),
            aten.leaky_relu_backward(x * 2, y, 0.2, False),
            aten.elu_backward(x * 3, 1.0, 1.0, 1.0, False, y),
            aten.softplus_backward(x * 4, y, 1.0, 20.0),
            aten.hardtanh_backward(x * 5, y, -1.0, 1.0),
            aten.gelu_backward(x * 6, y),
            aten.silu_backward(x * 7, y),
            aten.sigmoid_backward(x * 8, y),
            aten.tanh_backward(x * 9, y),
        ]

    names = ("threshold", "leaky_relu", "elu", "softplus", "hardtanh", "gelu", "silu", "sigmoid", "tanh")
    expected = [getattr(aten, f"{name}_backward") for name in names]
    assert_reuses(work, given(), *expected)
    for dtype in (torch.float32, torch.bfloat16):
        assert_reuses(work, [x.to(dtype) for x in given((64, 64), (64, 64))], *expected)


def test_a_product_writes_over_its_summand() -> None:
    def work(x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.addmm(x @ y, x, y, alpha=2), torch.baddbmm((x * 2)[None] + 1, x[None], y[None])]

    assert_reuses(work, given((4, 4), (4, 4)), aten.addmm, aten.add, aten.baddbmm)


def test_a_product_does_not_write_over_what_it_multiplies() -> None:
    def work(x: Tensor, y: Tensor) -> list[Tensor]:
        a, b = x * 2, y * 2
        return [torch.addmm(a, a, y), torch.addmm(y, b, x)]

    assert_reuses(work, given((4, 4), (4, 4)))


@pytest.mark.parametrize(
    "work",
    [
        lambda x, y: [x + y],  # inputs
        lambda x, y: [(z := x + y), z * 2],  # a result
        lambda x, y: [(z := x + y)[1:], z * 2],  # a view of it that is a result
        lambda x, y: [(z := x + y) * 2, z @ y.t()],  # read again
        lambda x, y: [(w := (x + y).t()).t() * 2, w.sum()],  # a view of it read again
        lambda x, y: [(z := x @ y.t()) * z.t()],  # another view of it read by the same call
        lambda x, y: [(x[:1] + y[:1]).expand(3, 4) * 2],  # elements that are one in memory
        lambda x, y: [(x @ y.t())[:, :2] * 2],  # a part
        lambda x, y: [(x + y).t() * torch.ones(4, 3, dtype=x.dtype).contiguous()],  # of another layout
        lambda x, y: [(x + y)[0] * y],  # of another shape
        lambda x, y: [(x + y) > 0],  # of another dtype
        lambda x, y: [x.contiguous() * 2],  # an input, where its layout is another
        lambda x, y: [(x + y).sum(0)],  # not elementwise
    ],
)
def test_what_is_still_needed_is_not_written_over(work: Work) -> None:
    made, _ = recorded(work, given())
    assert written_over(made) == []


def test_what_was_copied_in_one_layout_is_a_view_in_another() -> None:
    def work(x: Tensor) -> list[Tensor]:
        return [x.contiguous() * 2 + 1]

    strided = torch.randn(4, 3).t()
    made, _ = recorded(work, [strided])
    dense = torch.randn(3, 4)
    own = dense.clone()
    (found,) = made.run([own], lambda *_: [])
    assert torch.equal(own, dense)
    torch.testing.assert_close(found, dense * 2 + 1, rtol=0, atol=0)


def test_what_an_unrecorded_call_was_given_is_not_written_over() -> None:
    kept: list[Tensor] = []

    def outsider(name: Any, tensors: Any) -> list[Tensor]:
        kept.append(tensors[0])
        return [tensors[0].exp()]

    x, y = given()
    recorder = program.Recorder([x, y], cheaply=False)
    with torch.no_grad(), recorder:
        z = x * y
        (made,) = recorder.outside(outsider, "exp", [z])
        assert made is not None
        result = (z + x) * made  # z is read last, and the user has it
    whole = program.Program.of(recorder, [result])
    kept.clear()
    (found,) = whole.run([x, y], outsider)
    assert found is not None
    assert torch.equal(found, result)
    assert torch.equal(kept[0], x * y)


@pytest.mark.skipif(backends.program is None, reason="the loop in C++ is not built")
def test_steps_of_critics_take_less_memory_from_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    elementwise: Counter[str] = Counter()
    reused: Counter[str] = Counter()

    def noted(calls: list[Any], later: Any, places: Any) -> list[Any]:
        found = reusing(calls, later, places)
        elementwise[name] += sum(torch.Tag.pointwise in call[0].tags and isinstance(call[3], Slot) for call in calls)
        reused[name] += sum(a is not b for a, b in zip(calls, found, strict=True))
        return found

    monkeypatch.setattr(program, "reusing", noted)
    run.forget()
    for name in ("tanh, N 64", "sine, N 64", "RMSNorm, N 2", "residual GroupNorm, N 2"):
        case = SMALL[name]
        loss = gpk.CriticLoss(case.make())
        for _ in range(6):
            loss(torch.randn(case.shape), torch.randn(case.shape)).loss.backward()
        assert reused[name] > 0.5 * elementwise[name] > 0


@pytest.mark.parametrize("n", [4, 700])
def test_large_operands_are_multiplied_apart_and_small_ones_joined(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    cat = torch.cat

    def counted(tensors: Any, *args: Any) -> Tensor:
        found: Tensor = cat(tensors, *args)
        joined.append(found.numel())
        return found

    critic = mlp(3, 64, 64, 1).double()
    real, fake, eps = batch(n, 3)
    loss = gpk.CriticLoss(critic, together=True)
    exact = plain_loss(critic, real, fake, eps)
    monkeypatch.setattr(torch, "cat", counted)
    assert_exactly_as(loss(real, fake, eps=eps).loss, exact, critic)
    assert (3 * n * 64 in joined) == (n == 4)


def test_convolutions_are_right_where_operands_are_not_copied() -> None:
    critic = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten())
    critic.append(nn.Linear(2 * 10 * 10, 1)).double()
    real, fake = (torch.randn(60, 2, 12, 12, dtype=torch.float64) for _ in range(2))
    eps = torch.rand(60, dtype=torch.float64)
    loss = gpk.CriticLoss(critic, together=True)
    for _ in range(3):
        exact = plain_loss(critic, real, fake, eps)
        assert_exactly_as(loss(real, fake, eps=eps).loss, exact, critic)


@pytest.mark.parametrize(
    ("critic", "shape"),
    [
        (mlp(5, 24, 16, 1), (32, 5)),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 1)), (8, 2, 8, 8)),
        (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), (6, 3, 5)),  # several rows of a sample
    ],
)
def test_cotangents_of_scores_that_share_a_pass_take_no_copies_of_activations(
    critic: nn.Module, shape: tuple[int, ...]
) -> None:
    critic = critic.double()
    loss = gpk.CriticLoss(lambda x: critic(x).flatten(1).sum(1), objective="least-squares", penalty="r1")
    run.forget()
    weights = list(critic.parameters())
    for _ in range(4):
        real, fake = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
        x = real.clone().requires_grad_()
        scores = critic(x).flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        r1 = gradient.flatten(1).square().sum(1).mean()
        adversarial = (scores - 1).square().mean() + critic(fake).flatten(1).sum(1).square().mean()
        exact = torch.autograd.grad(adversarial + loss.penalty_weight * r1, weights)
        ours = torch.autograd.grad(loss(real, fake).loss, weights)
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    found = [signature.program for signature in program.signatures._entries.values()]
    whole = [p for p in found if p is not None]
    assert whole
    for made in whole:
        for part in made.parts:
            products = [call[3] for call in part.calls if call[0].overloadpacket in (aten.mul, aten.add)]
            assert all(part.facts.sizes[s] <= 8 * shape[0] * max(1, shape[1]) for s in products if isinstance(s, Slot))
