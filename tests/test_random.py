"""Random numbers: one seed gives the same on every backend, of the right distribution, and no other state changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gpkernels as gpk
from gpkernels import backends
from gpkernels.ops.instance_noise import instance_noise_op, instance_noise_reference
from gpkernels.ops.interpolate import interpolate_op
from gpkernels.ops.philox import draw_key, philox
from gpkernels.ops.tensors import accumulation_dtype
from watchers import PassesFunctions, PassesOps

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
needs_cpp = pytest.mark.skipif(backends.draw_key is backends.declined, reason="the fast path is not built")
KEY = torch.tensor([-6_148_914_691_236_517_206])  # every other bit, the sign too


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(dtype: torch.dtype, layout: str) -> Tensor:
    x = torch.randn(5, 3, 7, 9, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _philox_in_python(counter: int, key: int) -> tuple[int, ...]:
    """Philox-4x32-10 with Python's integers, as the paper states it."""
    mask = 0xFFFFFFFF
    c, k = [counter & mask, (counter >> 32) & mask, 0, 0], [key & mask, (key >> 32) & mask]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & mask, (first >> 32) ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return tuple(c)


def test_philox_gives_the_published_words_for_zero_key_and_counter() -> None:
    words = philox(torch.tensor([0]), torch.tensor([0]))
    assert tuple(int(w) for w in words) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def test_philox_uses_every_bit_of_key_and_counter() -> None:
    for counter in (0, 1, 2**31, 2**32 + 5, 2**62 + 3):
        for key in (0, 1, -1, 2**40 + 7, int(KEY)):
            words = philox(torch.tensor([key]), torch.tensor([counter]))
            assert tuple(int(w) for w in words) == _philox_in_python(counter, key % 2**64)


def test_a_key_is_what_randint_draws_and_leaves_the_generator_in_the_same_state(backend: str) -> None:
    def keys(draw: Callable[[], Tensor]) -> tuple[list[int], Tensor]:
        torch.manual_seed(3)
        return [int(draw()) for _ in range(1000)], torch.get_rng_state()

    expected, state = keys(lambda: torch.randint(-(2**63), 2**63 - 1, (1,)))
    found, after = keys(lambda: draw_key(torch.device("cpu")))
    assert found == expected
    assert torch.equal(after, state)
    assert min(found) < -(2**62)
    assert max(found) > 2**62


@needs_cpp
@pytest.mark.parametrize("mode", [PassesFunctions, PassesOps, FakeTensorMode])
def test_a_key_is_not_drawn_in_cpp_where_a_mode_sees_calls(mode: Any) -> None:
    state = torch.get_rng_state()
    with mode():
        assert backends.draw_key() is NotImplemented
    assert torch.equal(torch.get_rng_state(), state)
    assert backends.draw_key().shape == (1,)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_eps_of_hand_written_code(dtype: str, layout: str, backend: str) -> None:
    kind = DTYPES[dtype]
    real, fake = _images(kind, layout), _images(kind, layout)
    drawn: dict[str, Any] = {"dtype": torch.float64} if dtype == "float64" else {}  # else the default, float32
    expected = interpolate_op(real, fake, torch.rand(5, 1, 1, 1, generator=_generator(3), **drawn))
    assert torch.equal(gpk.interpolate(real, fake, generator=_generator(3)), expected)
    torch.manual_seed(3)
    assert torch.equal(gpk.interpolate(real, fake), expected)
    assert expected.stride() == real.stride()


@pytest.mark.parametrize("gaussian", [True, False], ids=["normal", "uniform"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_the_reference_to_a_few_ulp(dtype: str, layout: str, gaussian: bool, backend: str) -> None:
    kind = DTYPES[dtype]
    x = _images(kind, layout)
    for scale in (None, torch.tensor([1.7])):
        noisy = instance_noise_op(x, 0.5, scale, KEY, gaussian)
        # In float64 the 24 random bits are the same, so it is the exact answer for every dtype.
        exact = instance_noise_reference(x.double(), 0.5, scale, KEY, gaussian)
        # A cosine near zero keeps the absolute error of its angle, so the amplitude counts too.
        size = x.double().abs() + (exact - x.double()).abs() + 0.5 * (1 if scale is None else 1.7)
        wide = torch.finfo(accumulation_dtype(kind)).eps
        assert ((noisy.double() - exact).abs() <= size * (4 * wide + torch.finfo(kind).eps)).all()
        assert noisy.stride() == x.stride()


def test_noise_follows_memory_so_layouts_of_one_tensor_differ_and_strided_views_agree(backend: str) -> None:
    x = torch.randn(4, 3, 5, 5)
    plain = instance_noise_op(x, 1.0, None, KEY, True)
    assert torch.equal(instance_noise_op(torch.stack([x, x], -1)[..., 0], 1.0, None, KEY, True), plain)
    last = instance_noise_op(x.contiguous(memory_format=torch.channels_last), 1.0, None, KEY, True)
    assert not torch.equal(last, plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_draws_the_eps_of_hand_written_code(dynamic: bool) -> None:
    critic = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    for function in (gpk.interpolate, lambda real, fake: gpk.gradient_penalty(critic, real, fake)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for rows in (12, 7):
            found = []
            for call in (function, compiled):
                torch.manual_seed(3)
                found.append(call(X[:rows], Y[:rows]))
            torch.testing.assert_close(*found)


def _dragan_points(generator: torch.Generator | None) -> Tensor:
    seen: list[Tensor] = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().sum(1)

    gpk.dragan_penalty(critic, X, scale=0.5, generator=generator)
    return seen[0]


X, Y = torch.linspace(-2, 3, 60).reshape(12, 5), torch.linspace(7, 5, 60).reshape(12, 5)
DRAWS: dict[str, Callable[[torch.Generator | None], Tensor]] = {
    "interpolate": lambda generator: gpk.interpolate(X, Y, generator=generator),
    "add_instance_noise": lambda generator: gpk.add_instance_noise(X, 0.5, generator=generator),
    "dragan_penalty": _dragan_points,
    "gradient_penalty": lambda generator: gpk.gradient_penalty(
        lambda x: x.pow(3).sum(1), X, Y, generator=generator
    ).reshape(1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_repeats_and_another_seed_differs(name: str, backend: str) -> None:
    draw = DRAWS[name]
    assert torch.equal(draw(_generator(1)), draw(_generator(1)))
    assert not torch.equal(draw(_generator(1)), draw(_generator(2)))
    generator = _generator(1)
    first = draw(generator)
    assert not torch.equal(first, draw(generator))


@pytest.mark.parametrize("name", DRAWS)
def test_without_a_generator_the_global_seed_repeats(name: str, backend: str) -> None:
    draw = DRAWS[name]
    torch.manual_seed(3)
    first = draw(None)
    torch.manual_seed(3)
    assert torch.equal(draw(None), first)
    assert not torch.equal(draw(None), first)


@pytest.mark.parametrize("name", DRAWS)
def test_a_generator_leaves_the_global_state_alone(name: str, backend: str) -> None:
    before = torch.get_rng_state()
    DRAWS[name](_generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    DRAWS[name](None)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_given_eps_draws_nothing(backend: str) -> None:
    generator, eps = _generator(1), torch.rand(12)
    before, own = torch.get_rng_state(), generator.get_state()
    gpk.interpolate(X, Y, eps, generator=generator)
    gpk.gradient_penalty(lambda x: x.pow(3).sum(1), X, Y, eps=eps, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), own)


def test_a_seed_gives_the_same_numbers_on_every_backend() -> None:
    for name, draw in DRAWS.items():
        with gpk.backend("reference"):
            expected = draw(_generator(5))
        torch.testing.assert_close(draw(_generator(5)), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_eps_is_one_per_sample_and_uniform(backend: str) -> None:
    shape = (20_000, 3)
    eps = gpk.interpolate(torch.ones(shape), torch.zeros(shape), generator=_generator(11))
    assert (eps == eps[:, :1]).all()
    column = eps[:, 0].double()
    assert ((column >= 0) & (column < 1)).all()
    assert stats.kstest(column.numpy(), "uniform").pvalue > 0.01
    assert abs(torch.corrcoef(torch.stack([column[1:], column[:-1]]))[0, 1]) < 0.03


def test_instance_noise_is_normal_with_deviation_sigma(backend: str) -> None:
    x = torch.full((500, 4, 10), 3.0)
    noise = (gpk.add_instance_noise(x, 0.25, generator=_generator(12)) - x).double()
    assert stats.kstest(noise.flatten().numpy(), "norm", args=(0, 0.25)).pvalue > 0.01
    # The two halves of a Box-Muller pair, and neighbours of different pairs, are independent.
    for lag in (1, 2, 4):
        flat = noise.flatten()
        assert abs(torch.corrcoef(torch.stack([flat[lag:], flat[:-lag]]))[0, 1]) < 0.03


def test_dragan_perturbs_by_a_uniform_share_of_the_spread(backend: str) -> None:
    seen: list[Tensor] = []
    real = torch.randn(2_000, 6, generator=_generator(1)) * 4

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().sum(1)

    gpk.dragan_penalty(critic, real, scale=0.5, generator=_generator(13))
    uniform = ((seen[0] - real) / (0.5 * real.std())).double().flatten()
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01


def test_sigma_zero_gives_x(backend: str) -> None:
    for dtype in DTYPES.values():
        x = torch.randn(4, 5).to(dtype)
        assert torch.equal(gpk.add_instance_noise(x, 0.0), x)


def test_noise_passes_gradients_through_unchanged(backend: str) -> None:
    x, cotangent = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    gpk.add_instance_noise(x, 0.3).backward(cotangent)
    assert torch.equal(x.grad, cotangent)


def test_noise_has_the_same_bits_for_any_number_of_threads(backend: str) -> None:
    x, results = torch.randn(3, 70_001), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(gpk.add_instance_noise(x, 0.3, generator=_generator(1)))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_generator_of_another_device_is_refused() -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"generator.*cpu.*cuda"):
        gpk.interpolate(X, Y, generator=Elsewhere())
    with pytest.raises(ValueError, match=r"generator.*cpu.*cuda"):
        gpk.add_instance_noise(X, 1.0, generator=Elsewhere())


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 4, 4)], ids=["points", "images"])
@pytest.mark.parametrize("whole", [False, True], ids=["penalty", "loss"])
def test_training_by_hand_from_the_same_seed_takes_the_same_penalties(
    whole: bool, shape: tuple[int, ...], backend: str
) -> None:
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 16), nn.Tanh(), nn.Linear(16, 1))
    theirs = copy.deepcopy(ours)
    batches = [(torch.randn(shape), torch.randn(shape) + 1) for _ in range(5)]
    loss = gpk.CriticLoss(ours, penalty_weight=10.0)

    def by_us(real: Tensor, fake: Tensor) -> Tensor:
        return loss(real, fake).loss if whole else gpk.gradient_penalty(ours, real, fake)

    def by_hand(real: Tensor, fake: Tensor) -> Tensor:
        eps = torch.rand(len(real), *[1] * (real.dim() - 1))
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(theirs(x).sum(), x, create_graph=True)
        penalty = ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
        return theirs(fake).mean() - theirs(real).mean() + 10 * penalty if whole else penalty

    found = []
    for critic, step in ((ours, by_us), (theirs, by_hand)):
        torch.manual_seed(2)
        optimiser, values = torch.optim.SGD(critic.parameters(), lr=0.01), []
        for real, fake in batches:
            optimiser.zero_grad()
            value = step(real, fake)
            value.backward()
            optimiser.step()
            values.append(value.detach())
        found.append(torch.stack(values))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
