"""critic_batch: the groups of rows that a critic step goes over, copied below one another; points between two batches
are interpolated on the way.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import (
    accumulator,
    aligned,
    check_key,
    check_matrix,
    check_same,
    flat_sizes,
    hinted,
    launch,
    per_row,
    rows_of,
    spread,
)
from gpkernels.triton.interpolate import draw_block, mix_block


@triton.jit
def _copy_block(x, out, start, count, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        tl.store(out + at, tl.load(x + at))
    else:
        tl.store(out + at, tl.load(x + at, mask=at < count), mask=at < count)


@triton.jit(do_not_specialize=["stride", "rows", "cols", "blocks"])
def critic_batch_kernel(
    sources, fake, eps, out, stride: tl.int64, rows: tl.int64, cols: tl.int64, blocks: tl.int64,
    GROUPS: tl.constexpr, MIXED: tl.constexpr, RANDOM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    LONG: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A program does a block of one group; MIXED: the last group lies between its source and ``fake``."""
    program = tl.program_id(0).to(tl.int64)
    group, start, count = program // blocks, program % blocks * BLOCK, hinted(rows * cols, ALIGNED)
    for i in tl.static_range(GROUPS):
        if group == i:
            if MIXED and i == GROUPS - 1:
                if RANDOM:
                    weight = draw_block(eps, eps, start, rows, cols, ACC, BLOCK, LONG, False)
                else:
                    weight = per_row(eps, stride, start, rows, cols, ACC, BLOCK, LONG)
                mix_block(sources[i], fake, out + i * count, weight, start, count, ACC, BLOCK)
            else:
                _copy_block(sources[i], out + i * count, start, count, BLOCK)


def critic_batch(plain: Sequence[Tensor], points: Sequence[Tensor]) -> Tensor:
    if len(points) not in (0, 1, 3) or not (plain or points):
        raise RuntimeError("points: expected none, a batch, or real, fake and eps; with none, plain batches")
    sources = [*plain, *points[:1]]
    like, groups, mixed = sources[0], len(sources), len(points) == 3
    check_matrix("plain" if plain else "points", like)
    rows, cols = rows_of("plain" if plain else "points", like)
    for name, batches in (("plain", plain), ("points", points[:2])):
        for x in batches:
            check_same(name, x, like)
    fake, eps, stride, random = like, like, 0, False
    if mixed:
        fake, eps, random = points[1].contiguous(), points[2], points[2].dtype == torch.int64
        if random:
            check_key(eps)
        else:
            eps, stride = spread("eps", eps, rows)
    out = like.new_empty(groups * rows, cols)
    _, sizes = flat_sizes(like, out.numel())
    blocks = triton.cdiv(rows * cols, sizes["BLOCK"])
    launch(
        critic_batch_kernel, groups * blocks, like.device,
        tuple(x.contiguous() for x in sources), fake, eps, out, stride, rows, cols, blocks,
        GROUPS=groups, MIXED=mixed, RANDOM=random, ACC=accumulator(like), LONG=cols >= sizes["BLOCK"],
        ALIGNED=aligned(rows * cols), **sizes,
    )  # fmt: skip
    return out
