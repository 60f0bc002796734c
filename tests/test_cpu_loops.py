"""Loops of the CPU kernels: polynomials, sums, and results larger than the cache."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emulated
import gpkernels as gpk
from gpkernels import backends
from gpkernels.ops.consistency import consistency_backward_op, lipschitz_consistency_op
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_backward_op, gradient_norm_penalty_op
from gpkernels.ops.instance_noise import instance_noise_op, instance_noise_reference
from gpkernels.ops.interpolate import interpolate_backward_op, interpolate_op
from gpkernels.ops.normalise_curvature import normalise_curvature_op
from gpkernels.ops.philox import philox
from gpkernels.ops.relativistic_loss import (
    relativistic_loss_backward_op,
    relativistic_loss_backward_reference,
    relativistic_loss_op,
    relativistic_loss_reference,
)
from gpkernels.ops.score_loss import (
    ScoreLoss,
    score_loss_backward_op,
    score_loss_backward_reference,
    score_loss_op,
    score_loss_reference,
)

KEY = torch.tensor([-6_148_914_691_236_517_206])
needs_kernels = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU kernels are not built")


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CPU's headers, compiled without PyTorch."""
    compiler = emulated.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, library = Path(__file__).parent / "native" / "loops.cpp", tmp_path_factory.mktemp("loops") / "loops.so"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd", "-shared", "-fPIC"]
    emulated.run([compiler, *flags, "-Wall", "-Wextra", "-I", str(emulated.ROOT), str(source), "-o", str(library)])
    made = ctypes.CDLL(str(library))
    made.worst_log.restype = made.worst_cos_sin.restype = ctypes.c_double
    made.worst_softplus_of.restype = made.worst_sigmoid_of.restype = ctypes.c_double
    made.special_numbers_stay.restype = ctypes.c_bool
    made.write_mistakes.restype = made.last_level_cache.restype = ctypes.c_int64
    return made


def test_logarithm_is_right_to_two_ulp_for_every_argument(loops: ctypes.CDLL) -> None:
    assert 0 < loops.worst_log() < 1.3


def test_cosine_and_sine_are_right_to_two_ulp_for_every_argument(loops: ctypes.CDLL) -> None:
    assert 0 < loops.worst_cos_sin() < 1.6


@pytest.mark.parametrize("size", [4, 8])
def test_softplus_and_sigmoid_are_right_to_two_ulp_however_small_or_large(size: int, loops: ctypes.CDLL) -> None:
    assert 0 < loops.worst_softplus_of(size) < 2
    assert 0 < loops.worst_sigmoid_of(size) < 2.5


@pytest.mark.parametrize("size", [4, 8])
def test_softplus_and_sigmoid_of_infinities_and_nan(size: int, loops: ctypes.CDLL) -> None:
    assert loops.special_numbers_stay(size)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_writing_past_the_cache_fills_its_range_and_no_more(size: int, loops: ctypes.CDLL) -> None:
    assert loops.write_mistakes(size) == 0


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipping_misses_nothing_wherever_it_lies(dtype: torch.dtype) -> None:
    """Blocks are looked at before they are written; the neighbours of one with something outside are not."""
    for at in (0, 511, 512, 16_383, 16_384, 32_767, 32_768, 99_999):
        for value in (0.7, -math.inf, math.nan):
            x = torch.rand(100_000).sub_(0.5).to(dtype)
            x[at] = x[(7 * at + 5_000) % len(x)] = value
            expected = x.clamp(-0.5, 0.5)
            with gpk.backend("cpu"):
                gpk.clip_weights_(x, 0.5)
            torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_every_gaussian_number_is_right_to_a_few_ulp() -> None:
    zero = torch.zeros(1_000_003)
    with gpk.backend("cpu"):
        noise = instance_noise_op(zero, 1.0, None, KEY, True).double()
    exact = instance_noise_reference(zero.double(), 1.0, None, KEY, True)
    # The float64 cosine is of a rounded angle, so it is inexact near its zeros.
    assert ((noise - exact).abs() <= 4 * 2.0**-23 * exact.abs() + 1e-14).all()


@needs_kernels
@pytest.mark.parametrize("count", [1, 10, 255, 256, 257, 300, 3072, 32_768, 32_801])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_row_sums_lose_no_digits(dtype: torch.dtype, count: int) -> None:
    a, b = (torch.randn(3, count + 1, dtype=dtype)[:, 1:] for _ in range(2))
    with gpk.backend("cpu"):
        squares, _ = gradient_norm_penalty_op(a, 0.0, False, 0, 2.0)
        one = torch.ones(3, 1, dtype=dtype)
        mean, *_ = lipschitz_consistency_op(one, 0 * one, a, b, 0.0)
    tolerance = torch.finfo(dtype).eps if dtype == torch.float32 else 1e-14
    exact = [math.fsum(v * v for v in row) for row in a.tolist()]
    assert squares.tolist() == pytest.approx(exact, rel=tolerance, abs=0)
    apart = [math.fsum(v * v for v in row) for row in (a.double() - b.double()).tolist()]
    assert float(mean) == pytest.approx(math.fsum(d**-0.5 for d in apart) / 3, rel=tolerance, abs=0)


@needs_kernels
@pytest.mark.parametrize("count", [1, 31, 127, 128, 255, 256, 300, 1023, 32_768, 32_769, 100_003])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_of_any_count_are_those_of_float64(dtype: torch.dtype, count: int) -> None:
    real, fake = (x.to(dtype) for x in 20 * torch.randn(2, count, dtype=torch.float64))
    fake[0], fake[-1], real[count // 2] = -60, 30, 0
    one, tolerance = torch.ones((), dtype=dtype), {torch.float64: 1e-14, torch.float32: 4e-7}.get(dtype, 0.01)
    one = one.to(torch.promote_types(dtype, torch.float32))

    def check(found: Tensor, exact: Tensor, tolerance: float) -> None:
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()

    for kind in ScoreLoss:
        # A mean of numbers of both signs is as exact as one of their magnitudes.
        size = float(score_loss_reference([real.double().abs()], [kind], [0.3]).abs() + real.double().abs().mean())
        exact = score_loss_reference([real.double()], [kind], [0.3])
        with gpk.backend("cpu"):
            loss = score_loss_op([real], [kind], [0.3])
            (slope,) = score_loss_backward_op(one, [real], [kind], [0.3])
        assert abs(float(loss) - float(exact)) <= min(tolerance, 4e-7) * size
        check(slope, score_loss_backward_reference(one.double(), [real.double()], [kind], [0.3])[0], tolerance)
    with gpk.backend("cpu"):
        loss, slopes = relativistic_loss_op(real, fake), relativistic_loss_backward_op(one, real, fake)
    check(loss, relativistic_loss_reference(real.double(), fake.double()), min(tolerance, 4e-7))
    exact_slopes = relativistic_loss_backward_reference(one.double(), real.double(), fake.double())
    for slope, exact in zip(slopes, exact_slopes, strict=True):
        check(slope, exact, tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_losses_keep_the_tail(dtype: torch.dtype) -> None:
    """Also where it is subnormal; 400 equal scores take the loops of many lanes."""
    for score in (-20.0, -80.0, -100.0) if dtype == torch.float32 else (-20.0, -100.0, -700.0, -740.0):
        scores, one = torch.full((400,), score, dtype=dtype), torch.ones((), dtype=dtype)
        least = 2.0**-149 if dtype == torch.float32 else 5e-324
        with gpk.backend("cpu"):
            loss = float(score_loss_op([scores], [ScoreLoss.SOFTPLUS], [0.0]))
            mirrored = float(relativistic_loss_op(-scores, torch.zeros_like(scores)))
            (slope,) = score_loss_backward_op(400 * one, [scores], [ScoreLoss.SOFTPLUS], [0.0])
        odds, near = math.exp(score), {"rel": 4 * torch.finfo(dtype).eps, "abs": 2 * least}
        assert loss == mirrored == pytest.approx(math.log1p(odds), **near)
        assert float(slope[0]) == float(slope[-1]) == pytest.approx(odds / (1 + odds), **near)


@pytest.fixture(scope="module")
def cache(loops: ctypes.CDLL) -> int:
    """Bytes of the last-level cache, past which large results are written."""
    size = int(loops.last_level_cache())
    if not 0 < size <= 1 << 28:
        pytest.skip(f"a last-level cache of {size} bytes: nothing is written past it, or a test would need too much")
    return size


def _interpolate(x: Tensor, rows: Tensor) -> list[Tensor]:
    return [interpolate_op(x, x.flip(1), rows)]


def _interpolate_backward(x: Tensor, rows: Tensor) -> list[Tensor]:
    return list(interpolate_backward_op(x, rows, True, True))


def _penalty_backward(x: Tensor, rows: Tensor) -> list[Tensor]:
    return [gradient_norm_penalty_backward_op(rows, x, rows)]


def _consistency_backward(x: Tensor, rows: Tensor) -> list[Tensor]:
    scores = rows[:, None]
    return list(consistency_backward_op(torch.tensor(0.7), scores, scores, x, x.flip(1), rows, rows, True))


def _curvature(x: Tensor, rows: Tensor) -> list[Tensor]:
    x = x[:, None]
    return [normalise_curvature_op(x, rows[:, None, None], x.flip(2), x, True)]


def _relativistic_backward(x: Tensor, rows: Tensor) -> list[Tensor]:
    return list(relativistic_loss_backward_op(torch.tensor(float(x.numel())), x, x.flip(1)))  # of the sum


@needs_kernels
@pytest.mark.parametrize("cols", [40_003, 259])
@pytest.mark.parametrize(
    "op",
    [
        _interpolate,
        _interpolate_backward,
        _penalty_backward,
        _consistency_backward,
        _curvature,
        _relativistic_backward,
    ],
)
def test_results_larger_than_the_cache_are_those_of_their_parts(
    op: Callable[[Tensor, Tensor], list[Tensor]], cols: int, cache: int
) -> None:
    results = 2 if op in (_interpolate_backward, _consistency_backward, _relativistic_backward) else 1
    x = torch.randn(cache // (4 * cols * results) + 1, cols)
    rows = torch.rand(len(x))
    with gpk.backend("cpu"):
        whole = op(x, rows)
        for part in torch.arange(len(x)).chunk(3):
            own = slice(int(part[0]), int(part[-1]) + 1)
            for big, small in zip(whole, op(x[own], rows[own]), strict=True):
                assert torch.equal(big[own], small)


@needs_kernels
@pytest.mark.parametrize("gaussian", [True, False], ids=["normal", "uniform"])
def test_noise_larger_than_the_cache_is_that_of_its_parts(gaussian: bool, cache: int) -> None:
    x = torch.randn(cache // 4 + 5)
    short = len(x) - 1003
    with gpk.backend("cpu"):
        whole = instance_noise_op(x, 0.5, None, KEY, gaussian)
        assert torch.equal(whole[:short], instance_noise_op(x[:short], 0.5, None, KEY, gaussian))
    # The last numbers are those of the last counters.
    words = philox(KEY, torch.arange(short // 4, (len(x) + 3) // 4))
    u = torch.stack(words, 1).reshape(-1)[short % 4 :][: len(x) - short] // 2**8 / 2**24
    if not gaussian:
        torch.testing.assert_close(whole[short:], (x[short:].double() + 0.5 * u).float())
    assert ((whole[short:] != x[short:]) | (u == 0)).all()
