"""normalise_curvature: derivative of the JVP of a normalisation by its input.

For a tangent t and a cotangent d, group by group: r^2 ((3 c_t c_d - a) n - c_d t - c_t d), with t and d centred where
the normalisation centres. Groups that fit in registers are read once; longer ones are read twice, by a kernel for their
moments and a kernel for the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import accumulator, aligned, check_same, hinted, launch, split_sums, spread, wide

_LONGEST = 8192  # elements of a group that fit in registers


@triton.jit
def _bent(n, t, d, c_t, c_d, a, r):
    return r * r * ((3.0 * c_t * c_d - a) * n - c_d * t - c_t * d)


@triton.jit(do_not_specialize=["stride", "groups", "count"])
def normalise_curvature_kernel(
    normal, inverse, tangent, cotangent, out, stride: tl.int64, groups: tl.int64, count: tl.int64, share: tl.float64,
    ACC: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr, CENTRED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    col = tl.arange(0, COLS)[None, :]
    mask = (group < groups)[:, None] & (col < hinted(count, ALIGNED))
    at = group[:, None] * hinted(count, ALIGNED) + col
    n = tl.load(normal + at, mask=mask, other=0.0).to(ACC)
    t = tl.load(tangent + at, mask=mask, other=0.0).to(ACC)
    d = tl.load(cotangent + at, mask=mask, other=0.0).to(ACC)
    r = tl.load(inverse + group * stride, mask=group < groups, other=0.0).to(ACC)
    once = tl.full([], share, ACC)
    if CENTRED:
        t = tl.where(mask, t - (tl.sum(t, 1) * once)[:, None], 0.0)
        d = tl.where(mask, d - (tl.sum(d, 1) * once)[:, None], 0.0)
    c_t, c_d, a = tl.sum(n * t, 1) * once, tl.sum(n * d, 1) * once, tl.sum(t * d, 1) * once
    bent = _bent(n, t, d, c_t[:, None], c_d[:, None], a[:, None], r[:, None])
    tl.store(out + at, bent, mask=mask)


@triton.jit
def _pivot(x, ACC: tl.constexpr, COLS: tl.constexpr, CENTRED: tl.constexpr):
    """Return a number near the mean of a group, from its first elements, so that a covariance does not cancel."""
    pivot = tl.full([], 0.0, ACC)
    if CENTRED:
        pivot = tl.sum(tl.load(x + tl.arange(0, COLS)).to(ACC), 0) * (1.0 / COLS)
    return pivot


@triton.jit(do_not_specialize=["count", "span"])
def curvature_moments_kernel(
    normal, tangent, cotangent, partial, count: tl.int64, span: tl.int64,
    ACC: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr, CENTRED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    group = program // SPLITS
    base = group * hinted(count, ALIGNED)
    t_pivot = _pivot(tangent + base, ACC, COLS, CENTRED)
    d_pivot = _pivot(cotangent + base, ACC, COLS, CENTRED)
    begin = (program % SPLITS) * (span // COLS * COLS)
    end = hinted(tl.minimum(begin + span, count), ALIGNED)
    zero = tl.zeros([COLS], ACC)
    sum_n, sum_t, sum_d, sum_nt, sum_nd, sum_td = zero, zero, zero, zero, zero, zero
    for first in range(begin, end, COLS):
        col = first + tl.arange(0, COLS)
        n = tl.load(normal + base + col, mask=col < end, other=0.0).to(ACC)
        t = tl.load(tangent + base + col, mask=col < end, other=0.0).to(ACC) - t_pivot
        d = tl.load(cotangent + base + col, mask=col < end, other=0.0).to(ACC) - d_pivot
        t, d = tl.where(col < end, t, 0.0), tl.where(col < end, d, 0.0)
        sum_n, sum_t, sum_d = sum_n + n, sum_t + t, sum_d + d
        sum_nt, sum_nd, sum_td = sum_nt + n * t, sum_nd + n * d, sum_td + t * d
    to = partial + program
    tl.store(to, tl.sum(sum_n, 0))
    tl.store(to + programs, tl.sum(sum_t, 0))
    tl.store(to + 2 * programs, tl.sum(sum_d, 0))
    tl.store(to + 3 * programs, tl.sum(sum_nt, 0))
    tl.store(to + 4 * programs, tl.sum(sum_nd, 0))
    tl.store(to + 5 * programs, tl.sum(sum_td, 0))
    tl.store(to + 6 * programs, t_pivot)
    tl.store(to + 7 * programs, d_pivot)


@triton.jit
def _mean(partial, which, group, groups, share, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    return tl.sum(split_sums(partial + which * groups * SPLITS, group, groups, SPLITS, PADDED), 0) * share


@triton.jit(do_not_specialize=["stride", "groups", "count", "blocks"])
def curvature_of_long_groups_kernel(
    normal, inverse, tangent, cotangent, partial, out,
    stride: tl.int64, groups: tl.int64, count: tl.int64, blocks: tl.int64, share: tl.float64,
    ACC: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, CENTRED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group = program // blocks
    one, once = group + tl.arange(0, 1), tl.full([], share, ACC)
    c_t = _mean(partial, 3, one, groups, once, SPLITS, PADDED)
    c_d = _mean(partial, 4, one, groups, once, SPLITS, PADDED)
    a = _mean(partial, 5, one, groups, once, SPLITS, PADDED)
    t_mean, d_mean = tl.full([], 0.0, ACC), tl.full([], 0.0, ACC)
    if CENTRED:
        pivots = partial + (6 * groups + group) * SPLITS
        t_pivot, d_pivot = tl.load(pivots), tl.load(pivots + groups * SPLITS)
        n_mean = _mean(partial, 0, one, groups, once, SPLITS, PADDED)
        t_rest = _mean(partial, 1, one, groups, once, SPLITS, PADDED)
        d_rest = _mean(partial, 2, one, groups, once, SPLITS, PADDED)
        c_t, c_d, a = c_t - n_mean * t_rest, c_d - n_mean * d_rest, a - t_rest * d_rest
        t_mean, d_mean = t_pivot + t_rest, d_pivot + d_rest
    r = tl.load(inverse + group * stride).to(ACC)
    col = (program % blocks) * COLS + tl.arange(0, COLS)
    mask = col < hinted(count, ALIGNED)
    at = group * hinted(count, ALIGNED) + col
    n = tl.load(normal + at, mask=mask).to(ACC)
    t = tl.load(tangent + at, mask=mask).to(ACC) - t_mean
    d = tl.load(cotangent + at, mask=mask).to(ACC) - d_mean
    tl.store(out + at, _bent(n, t, d, c_t, c_d, a, r), mask=mask)


def _long_groups(n: Tensor, r: Tensor, t: Tensor, d: Tensor, out: Tensor, stride: int, centred: bool) -> None:
    groups, count, tile = n.shape[0] * n.shape[1], n.shape[2], 1024
    splits = max(1, min(triton.cdiv(count, 8 * tile), 2048 // groups, 64))
    span = triton.cdiv(triton.cdiv(count, splits), tile) * tile
    partial = wide(n, 8 * groups * splits)
    same = {"ACC": accumulator(n), "SPLITS": splits, "CENTRED": centred, "ALIGNED": aligned(count), "num_warps": 4}
    launch(
        curvature_moments_kernel, groups * splits, n.device, n, t, d, partial, count, span, COLS=tile, **same
    )  # fmt: skip
    blocks = triton.cdiv(count, tile)
    launch(
        curvature_of_long_groups_kernel, groups * blocks, n.device,
        n, r, t, d, partial, out, stride, groups, count, blocks, 1.0 / count,
        COLS=tile, PADDED=triton.next_power_of_2(splits), **same,
    )  # fmt: skip


def normalise_curvature(normal: Tensor, inverse: Tensor, tangent: Tensor, cotangent: Tensor, centred: bool) -> Tensor:
    if normal.dim() != 3:
        raise RuntimeError(f"normal: expected shape (N, groups, M), got {tuple(normal.shape)}")
    check_same("tangent", tangent, normal)
    check_same("cotangent", cotangent, normal)
    groups, count = normal.shape[0] * normal.shape[1], normal.shape[2]
    r, stride = spread("inverse", inverse, groups)
    n, t, d = normal.contiguous(), tangent.contiguous(), cotangent.contiguous()
    out = n.new_empty(n.shape)
    if out.numel() == 0:
        return out
    if count > _LONGEST:
        _long_groups(n, r, t, d, out, stride, bool(centred))
        return out
    cols = triton.next_power_of_2(count)
    height = max(1, min(1024 // cols, triton.next_power_of_2(groups)))
    launch(
        normalise_curvature_kernel, triton.cdiv(groups, height), n.device,
        n, r, t, d, out, stride, groups, count, 1.0 / count,
        ACC=accumulator(n), GROUPS=height, COLS=cols, CENTRED=bool(centred), ALIGNED=aligned(count),
        num_warps=max(4, min(16, height * cols // 512)),
    )  # fmt: skip
    return out
