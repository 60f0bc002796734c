"""Calls that are made in a cheaper way give what the call itself gives, and only where that was seen to be cheaper."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import gpkernels as gpk
from gpkernels.critic.cheaper import cheaper
from gpkernels.critic.program import Cheaply, Program, Recorder

aten = torch.ops.aten
GEOMETRY: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "3 x 3": ((2, 3, 8, 8), (4, 3, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    "strided": ((2, 3, 9, 7), (4, 3, 4, 2), ([2, 1], [1, 0], [1, 1], False, [0, 0], 1)),
    "a line": ((2, 3, 9), (4, 3, 4), ([2], [1], [1], False, [0], 1)),
    "one sample": ((1, 1, 5, 5), (1, 1, 5, 5), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
}
MASKS = list(itertools.product([True, False], repeat=3))[:-1]


def made(shapes: tuple[tuple[int, ...], tuple[int, ...], Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shape, weight, geometry = shapes
    x, w = torch.randn(shape, dtype=dtype), torch.randn(weight, dtype=dtype)
    c = torch.randn_like(aten.convolution(x, w, None, *geometry))
    return c, x, w, geometry


def check(func: Any, args: tuple[Any, ...], mask: Any = (True,)) -> None:
    """The other way gives what is asked for and no more, as the call gives it in float64 within rounding."""
    other = cheaper(func, args, {})
    assert other is not None
    found, wanted = other(), func(*[x.double() if isinstance(x, Tensor) else x for x in args])
    if isinstance(found, Tensor):
        found, wanted = [found], [wanted]
    assert [u is not None for u in found] == list(mask)
    for u, v in zip(found, wanted, strict=True):
        if u is not None:
            assert u.shape == v.shape
            assert (u - v).norm() <= 5e-7 * v.norm()


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("biased", [False, True])
def test_a_small_convolution_gives_the_same(name: str, biased: bool) -> None:
    _, x, w, geometry = made(GEOMETRY[name])
    bias = torch.randn(w.shape[0]) if biased else None
    check(aten.convolution.default, (x, w, bias, *geometry))


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("mask", MASKS)
def test_its_gradients_are_the_same(name: str, mask: tuple[bool, ...]) -> None:
    c, x, w, geometry = made(GEOMETRY[name])
    check(aten.convolution_backward.default, (c, x, w, [w.shape[0]], *geometry, list(mask)), mask)


def test_cotangents_may_lie_in_any_way() -> None:
    c, x, w, geometry = made(GEOMETRY["3 x 3"])
    for u in (c[:, :1, :1, :1].expand_as(c), c.contiguous(memory_format=torch.channels_last)):
        mask = [True, True, False]
        check(aten.convolution_backward.default, (u, x, w, None, *geometry, mask), mask)


def test_the_input_gradient_of_few_channels_is_cheaper_at_any_size() -> None:
    c, x, w, geometry = made(((40, 3, 16, 16), (64, 3, 3, 3), GEOMETRY["3 x 3"][2]))
    args = c, x, w, None, *geometry
    check(aten.convolution_backward.default, (*args, [True, False, False]), (True, False, False))
    assert cheaper(aten.convolution_backward.default, (*args, [True, True, False]), {}) is None


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "args",
    [
        lambda c, x, w, g: (x.double(), w.double(), None, *g),
        lambda c, x, w, g: (channels_last(x), w, None, *g),
        lambda c, x, w, g: (x, channels_last(w), None, *g),
        lambda c, x, w, g: (x, w, None, *g[:2], [2, 2], *g[3:]),
        lambda c, x, w, g: (x, w[:, :1].contiguous(), None, *g[:-1], 3),
        lambda c, x, w, g: (x, w.transpose(0, 1).contiguous(), None, *g[:3], True, *g[4:]),
        lambda c, x, w, g: (x, w[..., :1, :1].contiguous(), None, *g),
        lambda c, x, w, g: (x.repeat(8, 1, 1, 1), w, None, *g),
        lambda c, x, w, g: (x.repeat(1, 1, 32, 32), w, None, *g),
        lambda c, x, w, g: (x[:0], w, None, *g),
        lambda c, x, w, g: (x.to("meta"), w.to("meta"), None, *g),
    ],
    ids=[
        *("float64", "channels last", "weights channels last", "dilated", "in groups", "transposed", "1 x 1"),
        *("many samples", "large images", "empty", "no memory"),
    ],
)
def test_other_convolutions_are_left_alone(args: Any) -> None:
    assert cheaper(aten.convolution.default, args(*made(GEOMETRY["3 x 3"])), {}) is None


def test_other_calls_are_left_alone() -> None:
    assert cheaper(aten.mul.Tensor, (torch.ones(2), 2), {}) is None


@pytest.mark.parametrize("name", ["3 x 3", "a line"])
def test_a_program_has_the_cheaper_call_and_the_bits_of_its_first_run(name: str) -> None:
    c, x, w, geometry = made(GEOMETRY[name])

    def work(c: Tensor, x: Tensor, w: Tensor) -> list[Tensor | None]:
        return list(aten.convolution_backward(c, x, w, None, *geometry, [True, True, False])[:2])

    with Cheaply():
        first = work(c, x, w)
    recorder = Recorder([c, x, w])
    with recorder:
        results = work(c, x, w)
    program = Program.of(recorder, results)
    assert [func for func, *_ in recorder.calls if "conv" in func.name()] == [aten._slow_conv2d_backward.output_mask]
    found = program.run([c, x, w], lambda name, given: given)
    for u, v, z in zip(first, results, found, strict=True):
        assert u is not None
        assert z is not None
        assert torch.equal(u, v)  # type: ignore[arg-type]
        assert torch.equal(u, z)
        assert not any(z.untyped_storage()._cdata == t.untyped_storage()._cdata for t in (c, x, w))


@pytest.mark.parametrize("side", [0, 1, 2], ids=["first", "second", "both"])
def test_a_batch_of_products_with_an_expanded_tensor_is_one_call_of_dense_ones(side: int) -> None:
    dense, row = torch.randn(5, 4, 4), torch.randn(5, 1, 4).expand(5, 4, 4)
    a, b = (row if side in (i, 2) else dense for i in range(2))
    check(aten.bmm.default, (a, b))
    with torch.no_grad(), Recorder([a, b]) as recorder:
        product = aten.bmm(a, b)
    assert [call[0]._overloadpacket for call in recorder.calls] == [*[aten.contiguous] * (1 + side // 2), aten.bmm]
    program = Program.of(recorder, [product])
    for _ in range(3):
        (again,) = program.run([a, b], lambda what, given: [])
        assert torch.equal(again, product)
    assert cheaper(aten.bmm.default, (dense, dense.mT), {}) is None
    assert cheaper(aten.bmm.default, (dense, dense[:1].expand(5, 4, 4)), {}) is None


@pytest.mark.parametrize("last", ["permuted", "mean", "tokens"])
def test_a_cotangent_that_is_copied_has_pytorchs_numbers_in_every_call(last: str) -> None:
    """A convolution or product with an expanded or permuted cotangent: what copies it is no view."""
    conv, top = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 1)
    calls = {
        "permuted": lambda x: top(conv(x).permute(0, 2, 3, 1)).sum((1, 2, 3)),
        "mean": lambda x: conv(x).tanh().mean((1, 2, 3)) + conv(x).mean((1, 2, 3)),
        "tokens": lambda x: (conv(x).flatten(2) @ x.flatten(2).mT).mean((1, 2)),
    }
    critic = calls[last]
    for _ in range(5):
        x = torch.randn(2, 3, 8, 8)
        found = []
        for penalty in (lambda x: gpk.r1_penalty(critic, x), lambda x: plain_r1(critic, x)):
            value = penalty(x)
            found.append((value, *torch.autograd.grad(value, [conv.weight])))
        torch.testing.assert_close(*found)


def plain_r1(critic: Any, x: Tensor) -> Tensor:
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(moved).sum(), moved, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()
