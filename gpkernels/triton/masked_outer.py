"""masked_outer: the pull through a layer with one output, and the (leaky) ReLU before it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import accumulator, aligned, check_matrix, hinted, launch, tile_of, tile_sizes, vector


@triton.jit(do_not_specialize=["rows", "cols"])
def masked_outer_kernel(
    seeds, w, y, out, rows: tl.int64, cols: tl.int64, slope: tl.float64,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, col, at, mask = tile_of(rows, cols, ROWS, COLS, ALIGNED)
    seed = tl.load(seeds + row, mask=row < rows, other=0.0).to(ACC)[:, None]
    product = seed * tl.load(w + col, mask=col < hinted(cols, ALIGNED), other=0.0).to(ACC)[None, :]
    above = tl.load(y + at, mask=mask) > 0.0
    tl.store(out + at, tl.where(above, product, tl.full([], slope, ACC) * product), mask=mask)


def masked_outer(seeds: Tensor, w: Tensor, y: Tensor, slope: float) -> Tensor:
    check_matrix("y", y)
    rows, cols = y.shape
    seeds, w, y = vector("seeds", seeds, rows, y), vector("w", w, cols, y), y.contiguous()
    out = y.new_empty(y.shape)
    programs, sizes = tile_sizes(rows, cols)
    launch(
        masked_outer_kernel, programs, y.device, seeds, w, y, out, rows, cols, float(slope),
        ACC=accumulator(y), ALIGNED=aligned(cols), **sizes,
    )  # fmt: skip
    return out
