"""affine_gradients: gradients of w and b in y = x w + b.

cotangent and operand are (R, K, I), w and b (K,): sums of cotangent * operand, and of cotangent, over R and I.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import (
    accumulator,
    aligned,
    check_floating,
    check_same,
    hinted,
    last_to_arrive,
    launch,
    tickets,
    wide,
)


@triton.jit
def _columns_of_splits(partial, k, cols, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    split = tl.arange(0, PADDED)[:, None]
    mask = (split < SPLITS) & (k < cols)[None, :]
    return tl.sum(tl.load(partial + split * cols + k[None, :], mask=mask, other=0.0, cache_modifier=".cg"), 0)


@triton.jit(do_not_specialize=["rows", "cols", "inner", "blocks", "steps"])
def affine_gradients_kernel(
    cotangent, operand, to_w, to_b, partial, tickets,
    rows: tl.int64, cols: tl.int64, inner: tl.int64, blocks: tl.int64, steps: tl.int64,
    ACC: tl.constexpr, R: tl.constexpr, K: tl.constexpr, INNER: tl.constexpr, SPLITS: tl.constexpr,
    PADDED: tl.constexpr, PLANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sum ``steps`` tiles of (R, K, I) elements of one block of columns; the last program adds all programs' sums."""
    program = tl.program_id(0).to(tl.int64)
    block, split = program // SPLITS, program % SPLITS
    k = block * K + tl.arange(0, K)
    across = (inner + INNER - 1) // INNER
    total = (rows + R - 1) // R * across
    products, sums = tl.zeros([R, K, INNER], ACC), tl.zeros([R, K, INNER], ACC)
    for step in range(split * steps, tl.minimum((split + 1) * steps, total)):
        row = (step // across) * R + tl.arange(0, R)[:, None, None]
        i = (step % across) * INNER + tl.arange(0, INNER)[None, None, :]
        if PLANES:
            at = (row * cols + k[None, :, None]) * hinted(inner, ALIGNED) + i
            mask = (row < rows) & (k < cols)[None, :, None] & (i < hinted(inner, ALIGNED))
        else:
            at = row * hinted(cols, ALIGNED) + k[None, :, None]  # omits i = 0, of unknown alignment
            mask = (row < rows) & (k < hinted(cols, ALIGNED))[None, :, None]
        c = tl.load(cotangent + at, mask=mask, other=0.0).to(ACC)
        products += c * tl.load(operand + at, mask=mask, other=0.0).to(ACC)
        sums += c
    product, sum = tl.sum(tl.sum(products, 2), 0), tl.sum(tl.sum(sums, 2), 0)
    if SPLITS == 1:
        tl.store(to_w + k, product, mask=k < cols)
        tl.store(to_b + k, sum, mask=k < cols)
    else:
        tl.store(partial + split * cols + k, product, mask=k < cols)
        tl.store(partial + (SPLITS + split) * cols + k, sum, mask=k < cols)
        if last_to_arrive(tickets + block, SPLITS):
            tl.store(to_w + k, _columns_of_splits(partial, k, cols, SPLITS, PADDED), mask=k < cols)
            tl.store(to_b + k, _columns_of_splits(partial + SPLITS * cols, k, cols, SPLITS, PADDED), mask=k < cols)


def affine_gradients(cotangent: Tensor, operand: Tensor) -> tuple[Tensor, Tensor]:
    if cotangent.dim() != 3:
        raise RuntimeError(f"cotangent: expected shape (R, K, I), got {tuple(cotangent.shape)}")
    check_floating(cotangent)
    check_same("operand", operand, cotangent)
    c, x = cotangent.contiguous(), operand.contiguous()
    rows, cols, inner = c.shape
    to_w, to_b = wide(c, cols), wide(c, cols)
    if cols == 0:
        return to_w, to_b
    along = min(512, triton.next_power_of_2(max(1, inner)))
    across = min(triton.next_power_of_2(cols), max(1, 64 // along))
    height = 2048 // (along * across)
    blocks, steps = triton.cdiv(cols, across), triton.cdiv(rows, height) * triton.cdiv(inner, along)
    splits = max(1, min(triton.cdiv(steps, 4), 512 // blocks, 64))
    launch(
        affine_gradients_kernel, blocks * splits, c.device,
        c, x, to_w, to_b, wide(c, 2 * splits * cols), tickets(c.device, blocks),
        rows, cols, inner, blocks, triton.cdiv(steps, splits),
        ACC=accumulator(c), R=height, K=across, INNER=along, SPLITS=splits, PADDED=triton.next_power_of_2(splits),
        PLANES=inner > 1, ALIGNED=aligned(inner if inner > 1 else cols), num_warps=4,
    )  # fmt: skip
    return to_w, to_b
