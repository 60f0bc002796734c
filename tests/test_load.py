"""Long runs, many threads and arbitrary arguments. GPK_LOAD=1 makes the runs longer."""

from __future__ import annotations

import gc
import os
import re
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpkernels as gpk
from critics import Odd, mlp
from gpkernels.optim import RMSprop

LONG = os.environ.get("GPK_LOAD") == "1"
STEPS = 10_000 if LONG else 400
CALLS = 1_000 if LONG else 40
REAL, FAKE, EPS = (torch.linspace(-1, 1, n) for n in (48, 48, 8))


def _penalty(critic: nn.Module) -> Callable[[], Tensor]:
    return lambda: gpk.gradient_penalty(critic, REAL.view(8, 6), FAKE.view(8, 6), eps=EPS)


def _loss(critic: nn.Module, **options: Any) -> Callable[[], Tensor]:
    critic_loss = gpk.CriticLoss(critic, **options)
    return lambda: critic_loss(REAL.view(8, 6), FAKE.view(8, 6)).loss


def _of_gradient(critic: nn.Module) -> Callable[[], Tensor]:
    return lambda: gpk.input_gradient(critic, REAL.view(8, 6)).square().sum()


def _composed(critic: nn.Module) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        with gpk.fast_double_backward():
            return gpk.r1_penalty(critic, REAL.view(8, 6))

    return loss


PATHS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Callable[[], Tensor]]]] = {
    "a penalty": (lambda: mlp(6, 8, 1), _penalty),
    "a whole loss": (lambda: mlp(6, 8, 1), _loss),
    "a whole loss in separate batches": (lambda: mlp(6, 8, 1), lambda c: _loss(c, together=False)),
    "a lazy loss": (lambda: mlp(6, 8, 1), lambda c: _loss(c, penalty_every=4, penalty="r1")),
    "two penalties of a curved critic": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)),
        lambda c: _loss(c, penalty={"r1": 0.5, "r2": 0.5}, objective="relativistic"),
    ),
    "a call without a rule": (Odd, _loss),
    "a gradient as a value": (lambda: mlp(6, 8, 1), _of_gradient),
    "PyTorch's own derivatives": (lambda: mlp(6, 8, 1), _composed),
}


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most so far, in kB


@pytest.mark.parametrize("name", PATHS)
def test_steps_leave_nothing_behind(name: str) -> None:
    make, path = PATHS[name]
    critic = make()
    optimizer, loss = RMSprop(critic.parameters(), lr=1e-4, clip=0.5), path(critic)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(x), Tensor) for x in objects), len(objects)

    steps(STEPS // 4)
    before, most = alive(), _memory()
    steps(STEPS)
    after = alive()
    assert after[0] <= before[0]  # what other tests left may have been freed meanwhile
    assert after[1] - before[1] < STEPS // 20  # caches may have grown, but not by something a step
    if LONG:
        assert _memory() - most < STEPS / 4  # less than 256 bytes a step


@pytest.mark.parametrize("shared", [True, False], ids=["of one critic", "of a critic each"])
def test_eight_threads_compute_what_one_does(shared: bool) -> None:
    one = gpk.CriticLoss(mlp(6, 8, 1), together=False)
    critics = [one] * 8 if shared else [gpk.CriticLoss(mlp(6, 8, 1)) for _ in range(8)]

    def work(critic_loss: gpk.CriticLoss) -> list[Tensor]:
        loss = critic_loss(REAL.view(8, 6), FAKE.view(8, 6), eps=EPS).loss
        penalty = gpk.gradient_penalty(critic_loss.critic, REAL.view(8, 6), FAKE.view(8, 6), eps=EPS)
        return [loss.detach(), *torch.autograd.grad(loss + penalty, list(critic_loss.critic.parameters()))]

    exact = [work(critic_loss) for critic_loss in critics]

    def many(i: int) -> None:
        for _ in range(CALLS):
            torch.testing.assert_close(work(critics[i]), exact[i])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(many, range(8))) == [None] * 8


CRITIC = mlp(3, 4, 1)
FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {  # number of tensors, and a call of them
    "interpolate": (2, gpk.interpolate),
    "interpolate with eps": (3, gpk.interpolate),
    "gradient_norm_penalty": (1, gpk.gradient_norm_penalty),
    "consistency_term": (2, gpk.consistency_term),
    "consistency_term with features": (4, gpk.consistency_term),
    "lipschitz_consistency": (4, gpk.lipschitz_consistency),
    "add_instance_noise": (1, lambda x: gpk.add_instance_noise(x, 0.1)),
    "clip_weights_": (2, lambda *x: gpk.clip_weights_(list(x), 0.1)),
    "wgan_critic_loss": (2, gpk.wgan_critic_loss),
    "wgan_generator_loss": (1, gpk.wgan_generator_loss),
    "gan_discriminator_loss": (2, gpk.gan_discriminator_loss),
    "saturating_generator_loss": (1, gpk.saturating_generator_loss),
    "nonsaturating_generator_loss": (1, gpk.nonsaturating_generator_loss),
    "hinge_critic_loss": (2, gpk.hinge_critic_loss),
    "least_squares_critic_loss": (2, gpk.least_squares_critic_loss),
    "least_squares_generator_loss": (1, gpk.least_squares_generator_loss),
    "relativistic_critic_loss": (2, gpk.relativistic_critic_loss),
    "relativistic_generator_loss": (2, gpk.relativistic_generator_loss),
    "scaled_dot_product_attention": (3, gpk.scaled_dot_product_attention),
    "gradient_penalty": (2, lambda *x: gpk.gradient_penalty(CRITIC, *x)),
    "r1_penalty": (1, lambda x: gpk.r1_penalty(CRITIC, x)),
    "r2_penalty": (1, lambda x: gpk.r2_penalty(CRITIC, x)),
    "dragan_penalty": (1, lambda x: gpk.dragan_penalty(CRITIC, x)),
    "eikonal_loss": (1, lambda x: gpk.eikonal_loss(CRITIC, x)),
    "approximate_r1_penalty": (1, lambda x: gpk.approximate_r1_penalty(CRITIC, x, 0.1)),
    "input_gradient": (1, lambda x: gpk.input_gradient(CRITIC, x)),
    "CriticLoss": (2, lambda *x: gpk.CriticLoss(CRITIC)(*x)),
}
CRITICS = (
    *("gradient_penalty", "r1_penalty", "r2_penalty", "dragan_penalty", "eikonal_loss", "approximate_r1_penalty"),
    *("input_gradient", "CriticLoss"),
)
SIZES = [(), (0,), (1,), (4,), (4, 3), (0, 3), (4, 0), (2, 3, 3), (1, 1, 4, 3)]


@st.composite
def _tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.float64, torch.float16, torch.bfloat16, torch.int64]))
    shape = draw(st.sampled_from(SIZES))
    where = draw(st.sampled_from(["cpu"] * 6 + ["meta", "huge meta"]))
    if where != "cpu":
        huge = where == "huge meta" and len(shape) == 2
        return torch.empty((2**31 + 1, 3) if huge else shape, dtype=dtype, device="meta")
    x = torch.full(shape, draw(st.sampled_from([0.0, 0.5, -1.0, 1e-40, 1e30]))).to(dtype)
    special = draw(st.sampled_from([None, None, float("nan"), float("inf"), -float("inf")]))
    if special is not None and x.numel() and x.is_floating_point():
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = special
    layout = draw(st.sampled_from(["plain", "strided", "expanded", "transposed", "offset", "wants a gradient"]))
    if layout == "strided" and x.dim():
        return torch.stack([x, x], -1)[..., 0]
    if layout == "expanded" and x.dim():
        return x[:1].expand(x.shape) if x.numel() else x
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.requires_grad_() if layout.startswith("wants") and x.is_floating_point() else x


@pytest.mark.parametrize("name", FUNCTIONS)
@given(data=st.data())
@settings(max_examples=500 if LONG else 25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tensors_are_computed_or_refused_with_a_reason(name: str, data: st.DataObject) -> None:
    count, call = FUNCTIONS[name]
    given = [data.draw(_tensors()) for _ in range(count)]
    if data.draw(st.booleans()):
        given = given[:1] * count  # what matches gets further
    before = [x.detach().clone() for x in given]
    try:
        result = call(*given)
    except (TypeError, ValueError, RuntimeError) as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        layers = name in CRITICS and isinstance(refusal, RuntimeError)  # the critic's own layers refuse its input
        assert layers or re.match(r"\w+(\[\d+\])?: ", str(refusal)), refusal
        kept = [(x, y) for x, y in zip(given, before, strict=True) if x.device.type == "cpu"]
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in kept)
    else:
        found = [x for x in (result if isinstance(result, tuple) else [result]) if isinstance(x, Tensor)]
        assert found or name == "clip_weights_"
        if all(x.isfinite().all() and x.abs().max() < 1e3 for x in before if x.device.type == "cpu" and x.numel()):
            assert all(x.isfinite().all() for x in found if x.device.type == "cpu"), (given, result)


MANY = 2**31 + 2**16  # elements, which 32 bits do not count
PAST_32_BITS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # of zeros with a 3 at the end
    "norm of a row": (lambda x: gpk.gradient_norm_penalty(x[None], 0.0, reduction="sum"), 9.0),
    "norms of two rows": (lambda x: gpk.gradient_norm_penalty(x.view(2, -1), 0.0, reduction="none")[1], 9.0),
    "sum of scores": (lambda x: gpk.wgan_generator_loss(x) * MANY, -3.0),
}


@pytest.mark.parametrize("name", PAST_32_BITS)
def test_elements_past_32_bits_are_counted(name: str) -> None:
    """The pages of the zeros are the operating system's, so that they take no memory."""
    function, expected = PAST_32_BITS[name]
    x = torch.from_numpy(np.zeros(MANY, "int16")).view(torch.bfloat16)
    x[-1] = 3
    before = _memory()
    assert float(function(x)) == expected
    assert _memory() - before < 2**16  # KiB


def test_an_expanded_tensor_is_not_written() -> None:
    x = torch.ones(1).expand(MANY)
    with pytest.raises(RuntimeError, match=r"params\[0\].*not overlap"):
        gpk.clip_weights_([x], 0.5)
    assert x[0] == 1
