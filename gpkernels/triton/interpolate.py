"""interpolate: eps * real + (1 - eps) * fake, one eps per sample."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import (
    accumulator,
    begin_of_block,
    check_same,
    dense,
    empty_like,
    flat_sizes,
    launch,
    per_row,
    rows_of,
    spread,
)


@triton.jit
def _mix(real, fake, out, weight, at, mask, ACC: tl.constexpr):
    r = tl.load(real + at, mask=mask).to(ACC)
    f = tl.load(fake + at, mask=mask).to(ACC)
    tl.store(out + at, weight * r + (1.0 - weight) * f, mask=mask)


@triton.jit(do_not_specialize=["stride", "rows", "cols"])
def interpolate_kernel(
    real, fake, eps, out, stride: tl.int64, rows: tl.int64, cols: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    start = begin_of_block(BLOCK)
    weight = per_row(eps, stride, start, rows, cols, ACC, BLOCK, LONG)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= rows * cols:  # a mask of unknown length would prevent vector accesses
        _mix(real, fake, out, weight, at, None, ACC)
    else:
        _mix(real, fake, out, weight, at, at < rows * cols, ACC)


@triton.jit
def _split(cotangent, real, fake, weight, at, mask, ACC: tl.constexpr, TO_REAL: tl.constexpr, TO_FAKE: tl.constexpr):
    c = tl.load(cotangent + at, mask=mask).to(ACC)
    if TO_REAL:
        tl.store(real + at, weight * c, mask=mask)
    if TO_FAKE:
        tl.store(fake + at, (1.0 - weight) * c, mask=mask)


@triton.jit(do_not_specialize=["stride", "rows", "cols"])
def interpolate_backward_kernel(
    cotangent, eps, real, fake, stride: tl.int64, rows: tl.int64, cols: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr, TO_REAL: tl.constexpr, TO_FAKE: tl.constexpr,
):  # fmt: skip
    start = begin_of_block(BLOCK)
    weight = per_row(eps, stride, start, rows, cols, ACC, BLOCK, LONG)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= rows * cols:
        _split(cotangent, real, fake, weight, at, None, ACC, TO_REAL, TO_FAKE)
    else:
        _split(cotangent, real, fake, weight, at, at < rows * cols, ACC, TO_REAL, TO_FAKE)


def interpolate(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    rows, cols = rows_of("real", real)
    check_same("fake", fake, real)
    weights, stride = spread("eps", eps, rows)
    real, fake = dense(real, fake)
    out = empty_like(real)
    programs, sizes = flat_sizes(real, rows * cols)
    long = cols >= sizes["BLOCK"]
    launch(
        interpolate_kernel, programs, real.device, real, fake, weights, out, stride, rows, cols,
        ACC=accumulator(real), LONG=long, **sizes,
    )  # fmt: skip
    return out


def interpolate_backward(cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool) -> tuple[Tensor, Tensor]:
    rows, cols = rows_of("cotangent", cotangent)
    weights, stride = spread("eps", eps, rows)
    (c,) = dense(cotangent)
    real, fake = (empty_like(c) if wanted else c.new_empty(0) for wanted in (to_real, to_fake))
    programs, sizes = flat_sizes(c, rows * cols if to_real or to_fake else 0)
    long = cols >= sizes["BLOCK"]
    launch(
        interpolate_backward_kernel, programs, c.device, c, weights, real, fake, stride, rows, cols,
        ACC=accumulator(c), LONG=long, TO_REAL=to_real, TO_FAKE=to_fake, **sizes,
    )  # fmt: skip
    return real, fake
