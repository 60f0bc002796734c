"""`approximate_r1_penalty` is its formula, has no bias where a critic is linear, and trains weights."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from critics import mlp

estimate = gpk.approximate_r1_penalty


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_formula(critic: nn.Module, real: Tensor, sigma: float) -> Tensor:
    """Each sample's value, with the noise that ``seeded()`` gives."""
    noisy = gpk.add_instance_noise(real, sigma, generator=seeded())
    return (critic(real) - critic(noisy)).flatten(1).sum(1).square() / sigma**2


@pytest.mark.parametrize("outputs", [1, 3], ids=["a score", "a map of scores"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_its_formula_with_its_gradients(outputs: int, reduction: str) -> None:
    critic, real = mlp(5, 16, outputs, activation=nn.Tanh).double(), torch.randn(7, 5, dtype=torch.float64)
    each = by_formula(critic, real, 0.05)
    exact = each if reduction == "none" else getattr(each, reduction)()
    got = estimate(critic, real, 0.05, generator=seeded(), reduction=reduction)
    torch.testing.assert_close(got, exact)
    weights = list(critic.parameters())
    for g, e in zip(torch.autograd.grad(got.sum(), weights), torch.autograd.grad(exact.sum(), weights), strict=True):
        torch.testing.assert_close(g, e)


def test_of_a_linear_critic_its_expectation_is_the_square_of_the_weights() -> None:
    weight = torch.randn(6, dtype=torch.float64)
    real = torch.randn(200_000, 6, dtype=torch.float64)
    each = estimate(lambda x: x @ weight, real, 0.3, generator=seeded(), reduction="none") / weight.square().sum()
    error = each.std() / math.sqrt(len(real))
    assert error < 0.01
    assert abs(each.mean() - 1) < 4 * error
    assert each.std() == pytest.approx(math.sqrt(2), rel=0.03)


def test_it_comes_near_the_exact_penalty_as_sigma_falls() -> None:
    critic, real = mlp(4, 32, 1, activation=nn.Tanh).double(), torch.randn(20_000, 4, dtype=torch.float64)
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(4)
    exact = gpk.r1_penalty(critic, real)
    far, near = (abs(estimate(critic, real, s, generator=seeded()) / exact - 1).item() for s in (1.0, 0.01))
    assert near < 0.03 < far


def test_a_generator_repeats_the_noise_and_leaves_torchs_own_alone() -> None:
    critic, real = mlp(5, 8, 1), torch.randn(7, 5)
    state = torch.get_rng_state()
    values = [estimate(critic, real, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert not torch.equal(estimate(critic, real), estimate(critic, real))


def test_the_data_get_no_gradient_and_no_grad_mode_gives_no_graph() -> None:
    critic, real = mlp(5, 8, 1), torch.randn(7, 5, requires_grad=True)
    estimate(critic, real).backward()
    assert real.grad is None
    assert all(p.grad is not None for p in critic[0].parameters())
    with torch.no_grad():
        assert not estimate(critic, real).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_differences_of_low_precision_are_taken_in_float32(dtype: torch.dtype) -> None:
    real = torch.ones(9, 1, dtype=dtype)
    # Sums of these maps lie where float16 has a number in two, and bfloat16 one in 16.
    got = estimate(lambda x: torch.cat([x, torch.full_like(x, 2048.0)], 1), real, 0.5, generator=seeded())
    noisy = gpk.add_instance_noise(real, 0.5, generator=seeded())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, ((noisy.float() - 1) / 0.5).square().mean())


def test_it_calls_the_critic_twice_with_what_else_it_takes() -> None:
    seen = []

    class Conditional(nn.Module):
        def forward(self, x: Tensor, label: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
            seen.append(x)
            return x.sum(1) * label * scale, x

    real, label = torch.randn(7, 5), torch.arange(7.0)
    got = estimate(
        Conditional(), real, generator=seeded(), reduction="none", critic_args=(label,), critic_kwargs={"scale": 2.0}
    )
    clean, noisy = seen
    assert torch.equal(clean, real)
    torch.testing.assert_close(got, ((noisy - clean).sum(1) * label * 2 / 0.01).square(), rtol=1e-2, atol=1e-2)
    assert got[0] == 0
    assert got[1:].min() > 0


def test_fused_attention_which_has_no_second_derivative_is_taken() -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    scale = torch.ones((), requires_grad=True)
    value = estimate(lambda x: attention(x * scale, x, x).sum((1, 2)), torch.randn(3, 2, 4, 8))
    (gradient,) = torch.autograd.grad(value, scale)
    assert gradient.isfinite()
    assert gradient != 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "gpkernels"])
def test_it_compiles_whole(backend: str) -> None:
    torch.compiler.reset()
    critic, real = mlp(5, 16, 1, activation=nn.Tanh).double(), torch.randn(7, 5, dtype=torch.float64)
    step = torch.compile(lambda x: estimate(critic, x, 0.05), backend=backend, fullgraph=True)
    weights = list(critic.parameters())[:-1]  # a bias on top gets zeros or none
    for _ in range(3):
        torch.manual_seed(5)
        exact = torch.autograd.grad(estimate(critic, real, 0.05), weights)
        torch.manual_seed(5)
        got = torch.autograd.grad(step(real), weights)
        for g, e in zip(got, exact, strict=True):
            torch.testing.assert_close(g, e)


REAL = torch.randn(4, 3)
CRITIC = functools.partial(torch.sum, dim=1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((3, REAL), {}, TypeError, "critic: expected a module or a callable, got int"),
        ((nn.Flatten, REAL), {}, TypeError, "critic: expected a module or a callable, got the class Flatten; constr"),
        ((CRITIC, [1.0]), {}, TypeError, "real: expected a tensor, got list"),
        ((CRITIC, REAL.long()), {}, TypeError, "real: expected a dense floating-point tensor"),
        ((CRITIC, torch.tensor(1.0)), {}, ValueError, "real: expected a batch"),
        ((CRITIC, REAL, 0), {}, ValueError, "sigma: expected a finite number above 0, got 0.0"),
        ((CRITIC, REAL, -0.1), {}, ValueError, "sigma: expected a finite number above 0, got -0.1"),
        ((CRITIC, REAL, math.inf), {}, ValueError, "sigma: expected a finite number above 0, got inf"),
        ((CRITIC, REAL, math.nan), {}, ValueError, "sigma: expected a finite number above 0, got nan"),
        ((CRITIC, REAL, "0.1"), {}, TypeError, "sigma: expected a number, got str"),
        ((CRITIC, REAL), {"reduction": "max"}, ValueError, "reduction: expected one of none, mean, sum, got 'max'"),
        ((CRITIC, REAL), {"generator": 3}, TypeError, "generator: expected a torch.Generator, got int"),
        ((lambda x: "scores", REAL), {}, TypeError, "critic: expected scores as a tensor"),
        ((lambda x: x[:2].sum(1), REAL), {}, ValueError, r"critic: expected a score for each of 4 samples, got shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named(arguments: tuple, options: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        estimate(*arguments, **options)
