"""score_seeds: the scores' loss and the cotangents to pull from them, a bias added on the way."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.reference import SCORE_LOSSES
from gpkernels.triton.common import (
    accumulator,
    aligned,
    check_matrix,
    hinted,
    last_to_arrive,
    launch,
    rows_in_block,
    sum_of,
    tickets,
    vector,
)
from gpkernels.triton.functions import divide
from gpkernels.triton.score_loss import score_slope, score_value

_BLOCK, _PROGRAMS = 512, 256
# Where a group's slopes go: it is not scored, or to its seeds, its scale, or nowhere.
_UNSCORED, _SEEDS, _SCALE, _NOWHERE = range(4)


@triton.jit
def _of_group(s, seed, row, first, col, scale, n, size, KIND: tl.constexpr, WHERE: tl.constexpr):
    """phi of the scores of n rows from ``first``, 0 for others, and the seeds; phi's slopes go to them, or to scale."""
    inside = (row >= first) & (row < first + n)
    slope = divide(score_slope(s, KIND), tl.zeros_like(s) + size)
    if WHERE == 1:
        seed = tl.where(inside, slope, seed)
    elif WHERE == 2:
        tl.store(scale + (row - first), slope, mask=inside & (col == 0))
    return tl.where(inside, score_value(s, KIND), 0.0), seed


@triton.jit
def _store_parts(parts, loss):
    """(loss, loss, 0, 0)."""
    which = tl.arange(0, 4)
    tl.store(parts + which, tl.where(which < 2, loss, 0.0))


@triton.jit(do_not_specialize=["rows", "cols", "n", "real", "fake"])
def score_seeds_kernel(
    scores, bias, parts, seeds, scale, partial, ticket,
    rows: tl.int64, cols: tl.int64, n: tl.int64, real: tl.int64, fake: tl.int64,
    REAL_KIND: tl.constexpr, REAL_WHERE: tl.constexpr, FAKE_KIND: tl.constexpr, FAKE_WHERE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``real`` and ``fake`` are the first rows of these groups; SINGLE: one program does it all."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    count, size = hinted(rows * cols, ALIGNED), (n * cols).to(ACC)
    sums = tl.zeros([BLOCK], ACC)
    for start in range(program * BLOCK, count, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        row, col = rows_in_block(start, cols, BLOCK)
        s = tl.load(scores + at, mask=at < count, other=0.0).to(ACC)
        if BIASED:
            s += tl.load(bias + col, mask=at < count, other=0.0).to(ACC)
        seed = tl.zeros([BLOCK], ACC) + 1.0
        if REAL_WHERE > 0:
            value, seed = _of_group(s, seed, row, real, col, scale, n, size, REAL_KIND, REAL_WHERE)
            sums += value
        if FAKE_WHERE > 0:
            value, seed = _of_group(s, seed, row, fake, col, scale, n, size, FAKE_KIND, FAKE_WHERE)
            sums += value
        tl.store(seeds + at, seed, mask=at < count)
    if SINGLE:
        _store_parts(parts, divide(tl.sum(sums, 0), size))
    else:
        tl.store(partial + program, tl.sum(sums, 0))
        if last_to_arrive(ticket, programs):
            _store_parts(parts, divide(sum_of(partial, programs, ACC, 256), size))


def _where(group: int, n: int, plain: int) -> int:
    return _UNSCORED if group < 0 else _SEEDS if group * n < plain else _SCALE


def score_seeds(
    scores: Tensor, bias: Tensor, n: int, real: int, fake: int, real_kind: int, fake_kind: int, plain: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_matrix("scores", scores)
    rows, cols = scores.shape
    if n <= 0 or rows % n or scores.numel() == 0:
        raise RuntimeError("scores: expected groups of n rows, at least one")
    if not -1 <= min(real, fake) <= max(real, fake) < rows // n:
        raise RuntimeError("real, fake: expected groups of the scores, or -1")
    if not {real_kind, fake_kind} <= {*SCORE_LOSSES.values()}:
        raise RuntimeError("real_kind, fake_kind: expected score losses")
    bias, x = vector("bias", bias, cols if bias.numel() else 0, scores), scores.contiguous()
    where = [_where(group, n, plain) for group in (real, fake)]
    if where == [_SCALE, _SCALE]:
        where[0] = _NOWHERE  # as in the reference, the last one stays
    parts, seeds, scale = x.new_empty(4), x.new_empty(x.shape), x.new_empty(n if _SCALE in where else 0)
    programs = min(_PROGRAMS, triton.cdiv(x.numel(), 8 * _BLOCK))
    single = programs == 1
    launch(
        score_seeds_kernel, programs, x.device,
        x, bias, parts, seeds, scale, parts if single else x.new_empty(programs),
        parts if single else tickets(x.device, 1), rows, cols, n, real * n, fake * n,
        REAL_KIND=real_kind, REAL_WHERE=where[0], FAKE_KIND=fake_kind, FAKE_WHERE=where[1],
        ACC=accumulator(x), BLOCK=_BLOCK, BIASED=bias.numel() > 0, SINGLE=single, ALIGNED=aligned(x.numel()),
        num_warps=4,
    )  # fmt: skip
    return parts, seeds, scale
