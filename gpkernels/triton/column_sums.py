"""column_sums: sums over the rows of several matrices, some rows weighted. All matrices in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import accumulator, check_matrix, last_to_arrive, launch, tickets, vector

_TILE, _WIDEST = 2048, 64


@triton.jit
def _sum_columns(
    x, scale, sums, partial, ticket, block, split, program, rows, plain,
    COLS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr,
    PADDED: tl.constexpr, SCALED: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """One of the SPLITS shares of the rows, for WIDTH columns; the last to finish its share adds them all."""
    ROWS: tl.constexpr = TILE // WIDTH
    k = block * WIDTH + tl.arange(0, WIDTH)
    share = ((rows + SPLITS - 1) // SPLITS + ROWS - 1) // ROWS * ROWS
    parts = tl.zeros([ROWS, WIDTH], ACC)
    for first in range(split * share, tl.minimum((split + 1) * share, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (k < COLS)[None, :]
        value = tl.load(x + row[:, None] * COLS + k[None, :], mask=mask, other=0.0).to(ACC)
        if SCALED:
            by = tl.load(scale + (row - plain), mask=(row >= plain) & (row < rows), other=1.0).to(ACC)
            value *= by[:, None]
        parts += value
    total = tl.sum(parts, 0)
    if SPLITS > 1:
        lane = tl.arange(0, WIDTH)
        tl.store(partial + program * STRIDE + lane, total)
        if last_to_arrive(ticket, SPLITS):
            other = tl.arange(0, PADDED)[:, None]
            at = (program - split + other) * STRIDE + lane[None, :]
            total = tl.sum(tl.load(partial + at, mask=other < SPLITS, other=0.0, cache_modifier=".cg"), 0)
            tl.store(sums + k, total, mask=k < COLS)
    else:
        tl.store(sums + k, total, mask=k < COLS)


@triton.jit(do_not_specialize=["rows", "plain"])
def column_sums_kernel(
    matrices, scale, sums, partial, tickets, rows: tl.int64, plain: tl.int64,
    COLS: tl.constexpr, WIDTHS: tl.constexpr, ENDS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Each matrix has blocks of columns, ENDS counts them all up to its last; each block has SPLITS programs."""
    program = tl.program_id(0).to(tl.int64)
    block, split = program // SPLITS, program % SPLITS
    for i in tl.static_range(len(COLS)):
        if (block >= ENDS[i]) & (block < ENDS[i + 1]):
            _sum_columns(
                matrices[i], scale, sums[i], partial, tickets + block, block - ENDS[i], split, program, rows, plain,
                COLS[i], WIDTHS[i], TILE, ACC, SPLITS, PADDED, SCALED, STRIDE,
            )  # fmt: skip


def column_sums(matrices: Sequence[Tensor], plain: int, scale: Tensor) -> list[Tensor]:
    if not matrices:
        raise RuntimeError("matrices: expected at least one")
    like = matrices[0]
    for x in matrices:
        check_matrix("matrices", x)
        if x.dtype != like.dtype or x.shape[0] != like.shape[0]:
            raise RuntimeError("matrices: expected one dtype, and as many rows in each")
    if not 0 <= plain <= like.shape[0]:
        raise RuntimeError("plain: expected a number of rows")
    scale = vector("scale", scale, like.shape[0] - plain if scale.numel() else 0, like)
    dense, rows = [x.contiguous() for x in matrices], plain + scale.numel()
    sums = [x.new_empty(x.shape[1]) for x in dense]
    cols = tuple(x.shape[1] for x in dense)
    widths = tuple(min(_WIDEST, triton.next_power_of_2(max(1, c))) for c in cols)
    ends = (0, *accumulate(triton.cdiv(c, w) for c, w in zip(cols, widths, strict=True)))
    splits = max(1, min(triton.cdiv(rows, 4 * _TILE // _WIDEST), 512 // max(1, ends[-1]), 64))
    programs, alone = ends[-1] * splits, splits == 1
    launch(
        column_sums_kernel, programs, like.device,
        tuple(dense), scale, tuple(sums), scale if alone else like.new_empty(programs * max(widths)),
        scale if alone else tickets(like.device, ends[-1]), rows, plain,
        COLS=cols, WIDTHS=widths, ENDS=ends, TILE=_TILE, ACC=accumulator(like), SPLITS=splits,
        PADDED=triton.next_power_of_2(splits), SCALED=scale.numel() > 0, STRIDE=max(widths), num_warps=4,
    )  # fmt: skip
    return sums
