"""bias_activation_: a bias and a (leaky) ReLU, in place."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import accumulator, aligned, check_matrix, hinted, launch, tile_of, tile_sizes, vector


@triton.jit(do_not_specialize=["rows", "cols"])
def bias_activation_kernel(
    y, bias, rows: tl.int64, cols: tl.int64, slope: tl.float64,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BIASED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    _, col, at, mask = tile_of(rows, cols, ROWS, COLS, ALIGNED)
    value = tl.load(y + at, mask=mask).to(ACC)
    if BIASED:
        value += tl.load(bias + col, mask=col < hinted(cols, ALIGNED), other=0.0).to(ACC)[None, :]
    tl.store(y + at, tl.where(value > 0.0, value, tl.full([], slope, ACC) * value), mask=mask)


def bias_activation_(y: Tensor, bias: Tensor, slope: float) -> None:
    check_matrix("y", y)
    if not y.is_contiguous():
        raise RuntimeError("y: expected a contiguous matrix")
    rows, cols = y.shape
    bias = vector("bias", bias, cols if bias.numel() else 0, y)
    programs, sizes = tile_sizes(rows, cols)
    launch(
        bias_activation_kernel, programs, y.device, y, bias, rows, cols, float(slope),
        ACC=accumulator(y), BIASED=bias.numel() > 0, ALIGNED=aligned(cols), **sizes,
    )  # fmt: skip
