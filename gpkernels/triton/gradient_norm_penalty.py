"""gradient norm penalty: one pass over the rows gives norms, penalty and the coefficient that backward scales by."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops.gradient_norm_penalty import REDUCTIONS
from gpkernels.triton.common import (
    accumulator,
    aligned,
    begin_of_block,
    check_codes,
    dense,
    empty_like,
    flat_sizes,
    last_to_arrive,
    launch,
    per_row,
    row_sizes,
    rows_of,
    split_sums,
    spread,
    square_sums,
    sum_of,
    tickets,
    wide,
)
from gpkernels.triton.functions import divide, power_of, square_root


@triton.jit
def _penalty_of(
    squared, target, power, share,
    ACC: tl.constexpr, ONE_SIDED: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """||g| - target|^power of rows from |g|^2, and the coefficient that share times its derivative has."""
    if SMOOTH:  # target = 0, power = 2
        value = squared
        coefficient = tl.zeros_like(squared) + 2.0 * tl.full([], share, ACC)
    else:
        norm = square_root(squared)
        excess = norm - tl.full([], target, ACC)
        if ONE_SIDED:
            excess = tl.where(excess <= 0.0, 0.0, excess)
        if POWER == 2:
            value = excess * excess
            slope = 2.0 * excess
        elif POWER == 1:
            value = tl.abs(excess)
            slope = tl.where(excess > 0.0, 1.0, tl.where(excess < 0.0, -1.0, excess))
        else:
            size = tl.abs(excess)
            below = power_of(size, tl.full([], power, tl.float64) - 1.0)
            value = size * below
            slope = tl.full([], power, ACC) * below
            slope = tl.where(excess < 0.0, -slope, slope)
        coefficient = divide(slope, norm) * tl.full([], share, ACC)
        coefficient = tl.where(squared == 0.0, 0.0, coefficient)
    return value, coefficient


@triton.jit
def _penalty_rows(
    squared, values, coefficients, row, rows, target, power, share,
    ACC: tl.constexpr, ONE_SIDED: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """The penalties of some rows; stores what there is one of per row."""
    value, coefficient = _penalty_of(squared, target, power, share, ACC, ONE_SIDED, SMOOTH, POWER)
    tl.store(coefficients + row, coefficient, mask=row < rows)
    if not REDUCED:
        tl.store(values + row, value, mask=row < rows)
    return tl.where(row < rows, value, 0.0)


@triton.jit(do_not_specialize=["rows", "cols", "span"])
def gradient_norm_penalty_kernel(
    grad, values, coefficients, partial, ticket, rows: tl.int64, cols: tl.int64, span: tl.int64,
    target: tl.float64, power: tl.float64, share: tl.float64,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
    ONE_SIDED: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr, REDUCED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if SPLITS == 1:
        row = program * ROWS + tl.arange(0, ROWS)
        squared = square_sums(grad, grad, row, rows, 0, cols, cols, ACC, ROWS, COLS, False, ALIGNED)
        value = _penalty_rows(
            squared, values, coefficients, row, rows, target, power, share, ACC, ONE_SIDED, SMOOTH, POWER, REDUCED,
        )  # fmt: skip
        if REDUCED:
            tl.store(partial + program, tl.sum(value, 0))
            if last_to_arrive(ticket, tl.num_programs(0)):
                tl.store(values, sum_of(partial, tl.num_programs(0), ACC, 512) * tl.full([], share, ACC))
    else:
        own = program // SPLITS + tl.arange(0, 1)
        begin = (program % SPLITS) * (span // COLS * COLS)  # a multiple of COLS that the compiler can see
        end = tl.minimum(begin + span, cols)
        part = square_sums(grad, grad, own, rows, begin, end, cols, ACC, 1, COLS, False, ALIGNED)
        tl.store(partial + program + tl.arange(0, 1), part)
        if last_to_arrive(ticket, tl.num_programs(0)):
            total = tl.zeros([32], ACC)
            for first in range(0, rows, 32):
                row = first + tl.arange(0, 32)
                squared = split_sums(partial, row, rows, SPLITS, PADDED)
                total += _penalty_rows(
                    squared, values, coefficients, row, rows, target, power, share,
                    ACC, ONE_SIDED, SMOOTH, POWER, REDUCED,
                )  # fmt: skip
            if REDUCED:
                tl.store(values, tl.sum(total, 0) * tl.full([], share, ACC))


@triton.jit
def _scale(grad, out, scale, at, mask, ACC: tl.constexpr):
    tl.store(out + at, scale * tl.load(grad + at, mask=mask).to(ACC), mask=mask)


@triton.jit(do_not_specialize=["cotangent_stride", "stride", "rows", "cols"])
def gradient_norm_penalty_backward_kernel(
    cotangent, grad, coefficient, out, cotangent_stride: tl.int64, stride: tl.int64, rows: tl.int64, cols: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    start = begin_of_block(BLOCK)
    scale = per_row(cotangent, cotangent_stride, start, rows, cols, ACC, BLOCK, LONG)
    scale *= per_row(coefficient, stride, start, rows, cols, ACC, BLOCK, LONG)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= rows * cols:
        _scale(grad, out, scale, at, None, ACC)
    else:
        _scale(grad, out, scale, at, at < rows * cols, ACC)


def gradient_norm_penalty(
    grad: Tensor, target: float, one_sided: bool, reduction: int, power: float
) -> tuple[Tensor, Tensor]:
    rows, cols = rows_of("grad", grad)
    check_codes("reduction", [reduction], REDUCTIONS)
    (g,) = dense(grad)
    reduced = reduction != REDUCTIONS["none"]
    values, coefficients = wide(g, *([] if reduced else [rows])), wide(g, rows)
    how = row_sizes(rows, cols)
    share = 1.0 / rows if reduction == REDUCTIONS["mean"] else 1.0
    launch(
        gradient_norm_penalty_kernel, how["programs"], g.device,
        g, values, coefficients, wide(g, how["programs"]), tickets(g.device, 1), rows, cols, how["spans"][0],
        float(target), float(power), share,
        ACC=accumulator(g), ROWS=how["rows"], COLS=how["widths"][0], SPLITS=how["splits"],
        PADDED=triton.next_power_of_2(how["splits"]), ONE_SIDED=bool(one_sided), SMOOTH=target == 0 and power == 2,
        POWER=int(power) if power in (1, 2) else 0, REDUCED=reduced, ALIGNED=aligned(cols), num_warps=4,
    )  # fmt: skip
    return values, coefficients


def gradient_norm_penalty_backward(cotangent: Tensor, grad: Tensor, coefficient: Tensor) -> Tensor:
    rows, cols = rows_of("grad", grad)
    scale, stride = spread("coefficient", coefficient, rows)
    by, by_stride = spread("cotangent", cotangent, rows, one=True)
    (g,) = dense(grad)
    out = empty_like(g)
    programs, sizes = flat_sizes(g, rows * cols)
    long = cols >= sizes["BLOCK"]
    launch(
        gradient_norm_penalty_backward_kernel, programs, g.device, by, g, scale, out, by_stride, stride, rows, cols,
        ACC=accumulator(g), LONG=long, **sizes,
    )  # fmt: skip
    return out
