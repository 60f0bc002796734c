"""consistency_term and lipschitz_consistency: squared distances per row, then a formula; one backward for both."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import (
    accumulator,
    aligned,
    check_same,
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
from gpkernels.triton.functions import divide, square_root


@triton.jit
def _pair_rows(
    a, b, by_a, by_b, row, rows, margin, weight, share, ACC: tl.constexpr, LIPSCHITZ: tl.constexpr
):  # fmt: skip
    """Values of some rows from their squared distances a and b; stores the coefficients."""
    once = tl.full([], share, ACC)
    if LIPSCHITZ:  # max(0, sqrt(a / b) - margin), 0 where either distance is 0
        ratio = square_root(divide(a, b))
        excess = ratio - tl.full([], margin, ACC)
        idle = (a == 0.0) | (b == 0.0) | (excess <= 0.0)
        a_coefficient, b_coefficient = divide(ratio * once, a), -divide(ratio * once, b)
    else:  # max(0, a + weight * b - margin)
        excess = a + tl.full([], weight, ACC) * b - tl.full([], margin, ACC)
        idle = excess <= 0.0
        a_coefficient = tl.zeros_like(a) + 2.0 * once
        b_coefficient = a_coefficient * tl.full([], weight, ACC)
    tl.store(by_a + row, tl.where(idle, 0.0, a_coefficient), mask=row < rows)
    tl.store(by_b + row, tl.where(idle, 0.0, b_coefficient), mask=row < rows)
    return tl.where(idle | (row >= rows), 0.0, excess)


@triton.jit(do_not_specialize=["rows", "a_cols", "b_cols", "a_span", "b_span"])
def pair_penalty_kernel(
    a1, a2, b1, b2, total, by_a, by_b, partial, ticket,
    rows: tl.int64, a_cols: tl.int64, b_cols: tl.int64, a_span: tl.int64, b_span: tl.int64,
    margin: tl.float64, weight: tl.float64, share: tl.float64,
    ACC: tl.constexpr, ROWS: tl.constexpr, A_COLS: tl.constexpr, B_COLS: tl.constexpr, SPLITS: tl.constexpr,
    PADDED: tl.constexpr, LIPSCHITZ: tl.constexpr, A_ALIGNED: tl.constexpr, B_ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    if SPLITS == 1:
        row = program * ROWS + tl.arange(0, ROWS)
        a = square_sums(a1, a2, row, rows, 0, a_cols, a_cols, ACC, ROWS, A_COLS, True, A_ALIGNED)
        b = square_sums(b1, b2, row, rows, 0, b_cols, b_cols, ACC, ROWS, B_COLS, True, B_ALIGNED)
        value = _pair_rows(a, b, by_a, by_b, row, rows, margin, weight, share, ACC, LIPSCHITZ)
        tl.store(partial + program, tl.sum(value, 0))
        if last_to_arrive(ticket, programs):
            tl.store(total, sum_of(partial, programs, ACC, 512) * tl.full([], share, ACC))
    else:
        own = program // SPLITS + tl.arange(0, 1)
        split = program % SPLITS
        a_begin, b_begin = split * (a_span // A_COLS * A_COLS), split * (b_span // B_COLS * B_COLS)  # visible multiples
        a_end, b_end = tl.minimum(a_begin + a_span, a_cols), tl.minimum(b_begin + b_span, b_cols)
        a_part = square_sums(a1, a2, own, rows, a_begin, a_end, a_cols, ACC, 1, A_COLS, True, A_ALIGNED)
        b_part = square_sums(b1, b2, own, rows, b_begin, b_end, b_cols, ACC, 1, B_COLS, True, B_ALIGNED)
        one = program + tl.arange(0, 1)
        tl.store(partial + one, a_part)
        tl.store(partial + programs + one, b_part)
        if last_to_arrive(ticket, programs):
            value = tl.zeros([32], ACC)
            for first in range(0, rows, 32):
                row = first + tl.arange(0, 32)
                a = split_sums(partial, row, rows, SPLITS, PADDED)
                b = split_sums(partial + programs, row, rows, SPLITS, PADDED)
                value += _pair_rows(a, b, by_a, by_b, row, rows, margin, weight, share, ACC, LIPSCHITZ)
            tl.store(total, tl.sum(value, 0) * tl.full([], share, ACC))


@triton.jit
def _pull(x1, x2, to1, to2, scale, at, mask, ACC: tl.constexpr):
    v = scale * (tl.load(x1 + at, mask=mask).to(ACC) - tl.load(x2 + at, mask=mask).to(ACC))
    tl.store(to1 + at, v, mask=mask)
    tl.store(to2 + at, -v, mask=mask)


@triton.jit
def _pull_block(
    cotangent, x1, x2, coefficient, stride, to1, to2, start, rows, cols,
    ACC: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    scale = tl.load(cotangent).to(ACC) * per_row(coefficient, stride, start, rows, cols, ACC, BLOCK, LONG)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= rows * cols:
        _pull(x1, x2, to1, to2, scale, at, None, ACC)
    else:
        _pull(x1, x2, to1, to2, scale, at, at < rows * cols, ACC)


@triton.jit(do_not_specialize=["a_stride", "b_stride", "a_blocks", "rows", "a_cols", "b_cols"])
def consistency_backward_kernel(
    cotangent, a1, a2, b1, b2, by_a, by_b, to_a1, to_a2, to_b1, to_b2,
    a_stride: tl.int64, b_stride: tl.int64, a_blocks: tl.int64, rows: tl.int64, a_cols: tl.int64, b_cols: tl.int64,
    ACC: tl.constexpr, BLOCK: tl.constexpr, A_LONG: tl.constexpr, B_LONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < a_blocks:
        start = program * BLOCK
        _pull_block(cotangent, a1, a2, by_a, a_stride, to_a1, to_a2, start, rows, a_cols, ACC, BLOCK, A_LONG)
    else:
        start = (program - a_blocks) * BLOCK
        _pull_block(cotangent, b1, b2, by_b, b_stride, to_b1, to_b2, start, rows, b_cols, ACC, BLOCK, B_LONG)


def _pair_penalty(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], margin: float, weight: float, lipschitz: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, a_cols), (b_rows, b_cols) = rows_of("a", a[0]), rows_of("b", b[0])
    check_same("a", a[1], a[0])
    check_same("b", b[1], b[0])
    if rows != b_rows:
        raise RuntimeError(f"b: expected the batch of a, {rows}, got {b_rows}")
    (a1, a2), (b1, b2) = dense(*a), dense(*b)
    total, by_a, by_b = wide(a1), wide(a1, rows), wide(a1, rows)
    how = row_sizes(rows, a_cols, b_cols)
    partial = wide(b1 if b1.dtype == torch.float64 else a1, 2 * how["programs"])
    launch(
        pair_penalty_kernel, how["programs"], a1.device,
        a1, a2, b1, b2, total, by_a, by_b, partial, tickets(a1.device, 1), rows, a_cols, b_cols, *how["spans"],
        float(margin), float(weight), 1.0 / rows,
        ACC=accumulator(a1, b1), ROWS=how["rows"], A_COLS=how["widths"][0], B_COLS=how["widths"][1],
        SPLITS=how["splits"], PADDED=triton.next_power_of_2(how["splits"]), LIPSCHITZ=lipschitz,
        A_ALIGNED=aligned(a_cols), B_ALIGNED=aligned(b_cols), num_warps=4,
    )  # fmt: skip
    return total, by_a, by_b


def consistency_term(
    score1: Tensor, score2: Tensor, features1: Tensor, features2: Tensor, margin: float, feature_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight = feature_weight / max(1, rows_of("features1", features1)[1])
    return _pair_penalty((score1, score2), (features1, features2), margin, weight, False)


def lipschitz_consistency(
    score1: Tensor, score2: Tensor, x1: Tensor, x2: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _pair_penalty((score1, score2), (x1, x2), margin, 0.0, True)


def consistency_backward(
    cotangent: Tensor,
    a1: Tensor,
    a2: Tensor,
    b1: Tensor,
    b2: Tensor,
    a_coefficient: Tensor,
    b_coefficient: Tensor,
    to_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, a_cols = rows_of("pair", a1)
    check_same("pair", a2, a1)
    by_a, a_stride = spread("coefficient", a_coefficient, rows)
    by, _ = spread("cotangent", cotangent, 1)
    (a1, a2), (b1, b2) = dense(a1, a2), dense(b1, b2)
    to_a1, to_a2 = empty_like(a1), empty_like(a2)
    to_b1, to_b2, b_cols, by_b, b_stride = b1.new_empty(0), b1.new_empty(0), 0, by_a, 0
    if to_b:
        b_rows, b_cols = rows_of("pair", b1)
        check_same("pair", b2, b1)
        by_b, b_stride = spread("coefficient", b_coefficient, b_rows)
        if b_rows != rows:
            raise RuntimeError(f"b: expected the batch of a, {rows}, got {b_rows}")
        to_b1, to_b2 = empty_like(b1), empty_like(b2)
    _, sizes = flat_sizes(a1, rows * (a_cols + b_cols))
    a_blocks, b_blocks = (triton.cdiv(rows * cols, sizes["BLOCK"]) for cols in (a_cols, b_cols))
    launch(
        consistency_backward_kernel, a_blocks + b_blocks, a1.device,
        by, a1, a2, b1, b2, by_a, by_b, to_a1, to_a2, to_b1, to_b2, a_stride, b_stride, a_blocks, rows, a_cols, b_cols,
        ACC=accumulator(a1, b1), A_LONG=a_cols >= sizes["BLOCK"], B_LONG=b_cols >= sizes["BLOCK"], **sizes,
    )  # fmt: skip
    return to_a1, to_a2, to_b1, to_b2
