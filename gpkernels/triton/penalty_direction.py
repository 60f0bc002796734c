"""penalty_direction_: a penalty of a gradient, which becomes the penalty's own gradient in the same launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import (
    accumulator,
    aligned,
    hinted,
    last_to_arrive,
    launch,
    rows_of,
    square_sums,
    sum_of,
    tickets,
)
from gpkernels.triton.gradient_norm_penalty import penalty_of


@triton.jit
def _store_parts(parts, sums, weight, share, ACC: tl.constexpr):
    mean = sums * tl.full([], share, ACC)
    tl.store(parts + 2, mean)
    tl.store(parts, tl.load(parts).to(ACC) + tl.full([], weight, ACC) * mean)


@triton.jit(do_not_specialize=["rows", "cols"])
def penalty_direction_kernel(
    grad, parts, partial, ticket, rows: tl.int64, cols: tl.int64,
    weight: tl.float64, target: tl.float64, share: tl.float64,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RESIDENT: tl.constexpr, SINGLE: tl.constexpr,
    ONE_SIDED: tl.constexpr, SMOOTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """RESIDENT: rows stay in registers, others are read twice; SINGLE: one program has all rows."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    base_of_row, stop = row[:, None] * hinted(cols, ALIGNED), hinted(cols, ALIGNED)
    if RESIDENT:
        at = base_of_row + tl.arange(0, COLS)[None, :]
        mask = (row < rows)[:, None] & (tl.arange(0, COLS) < stop)[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        value, coefficient = penalty_of(tl.sum(g * g, 1), target, share, ACC, ONE_SIDED, SMOOTH)
        scale = tl.full([], weight, ACC) * coefficient
        tl.store(grad + at, scale[:, None] * g, mask=mask)
    else:
        squared = square_sums(grad, grad, row, rows, 0, cols, cols, ACC, ROWS, COLS, False, ALIGNED)
        value, coefficient = penalty_of(squared, target, share, ACC, ONE_SIDED, SMOOTH)
        scale = tl.full([], weight, ACC) * coefficient
        for first in range(0, stop, COLS):
            col = first + tl.arange(0, COLS)
            mask = (row < rows)[:, None] & (col < stop)[None, :]
            at = base_of_row + col[None, :]
            tl.store(grad + at, scale[:, None] * tl.load(grad + at, mask=mask).to(ACC), mask=mask)
    sums = tl.sum(tl.where(row < rows, value, 0.0), 0)
    if SINGLE:
        _store_parts(parts, sums, weight, share, ACC)
    else:
        tl.store(partial + program, sums)
        if last_to_arrive(ticket, tl.num_programs(0)):
            total = sum_of(partial, tl.num_programs(0), ACC, 512)
            _store_parts(parts, total, weight, share, ACC)


def _sizes(rows: int, cols: int) -> dict[str, int]:
    """All rows to a program where that is little, else many or one, with 16 elements to a thread."""
    width, height = triton.next_power_of_2(max(1, cols)), triton.next_power_of_2(rows)
    width = min(8192, width)
    height = height if height * width <= 4096 else max(1, 2048 // width)
    return {"ROWS": height, "COLS": width, "num_warps": min(16, max(4, height * width // 512))}


def penalty_direction_(gradient: Tensor, parts: Tensor, weight: float, target: float, one_sided: bool) -> None:
    rows, cols = rows_of("gradient", gradient)
    if gradient.dtype not in (torch.float32, torch.float64) or not gradient.is_contiguous():
        raise RuntimeError("gradient: expected a contiguous tensor of float32 or float64")
    if parts.numel() != 4 or not parts.is_contiguous() or parts.dtype != gradient.dtype:
        raise RuntimeError("parts: expected four contiguous numbers of the gradient's dtype")
    sizes = _sizes(rows, cols)
    programs = triton.cdiv(rows, sizes["ROWS"])
    single, device = programs == 1, gradient.device
    launch(
        penalty_direction_kernel, programs, device,
        gradient, parts, parts if single else parts.new_empty(programs),
        parts if single else tickets(device, 1), rows, cols, float(weight), float(target), 1.0 / rows,
        ACC=accumulator(gradient), RESIDENT=cols <= sizes["COLS"], SINGLE=single, ONE_SIDED=bool(one_sided),
        SMOOTH=target == 0, ALIGNED=aligned(cols), **sizes,
    )  # fmt: skip
