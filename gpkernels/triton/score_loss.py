"""score losses: the sum over tensors of mean phi(scores), and its derivative. All tensors in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops.score_loss import ScoreLoss
from gpkernels.triton.common import (
    accumulator,
    check_codes,
    check_floating,
    last_to_arrive,
    launch,
    spread,
    sum_of,
    tickets,
    wide,
)
from gpkernels.triton.functions import divide, exp_of_negative, log1p

_BLOCK, _PROGRAMS = 1024, 256


@triton.jit
def _softplus(s):
    return tl.where(s > 0.0, s, 0.0) + log1p(exp_of_negative(-tl.abs(s)))


@triton.jit
def _sigmoid(s):
    power = exp_of_negative(-tl.abs(s))
    return divide(tl.where(s >= 0.0, 1.0, power), 1.0 + power)


@triton.jit
def _relu(x):
    """max(0, x); NaN stays NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _score_value(s, KIND: tl.constexpr):
    """phi(s), by ``ScoreLoss``."""
    if KIND == 0:
        value = s
    elif KIND == 1:
        value = -s
    elif KIND == 2:
        value = _softplus(s)
    elif KIND == 3:
        value = _softplus(-s)
    elif KIND == 4:
        value = -_softplus(s)
    elif KIND == 5:
        value = _relu(1.0 + s)
    else:
        value = _relu(1.0 - s)
    return value


@triton.jit
def _score_slope(s, KIND: tl.constexpr):
    """phi'(s)."""
    if KIND == 0:
        slope = tl.zeros_like(s) + 1.0
    elif KIND == 1:
        slope = tl.zeros_like(s) - 1.0
    elif KIND == 2:
        slope = _sigmoid(s)
    elif KIND == 3:
        slope = -_sigmoid(-s)
    elif KIND == 4:
        slope = -_sigmoid(s)
    elif KIND == 5:
        slope = tl.where(1.0 + s <= 0.0, 0.0, 1.0).to(s.dtype)
    else:
        slope = tl.where(1.0 - s <= 0.0, 0.0, -1.0).to(s.dtype)
    return slope


@triton.jit
def score_loss_kernel(
    scores, counts, total, partial, ticket, KINDS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    mean = tl.zeros([BLOCK], ACC)
    for i in tl.static_range(len(KINDS)):
        count = tl.full([], counts[i], tl.int64)
        sums = tl.zeros([BLOCK], ACC)
        for first in range(program * BLOCK, count, programs * BLOCK):
            at = first + tl.arange(0, BLOCK)
            s = tl.load(scores[i] + at, mask=at < count, other=0.0).to(ACC)
            sums += tl.where(at < count, _score_value(s, KINDS[i]), 0.0)
        mean += divide(sums, tl.zeros_like(sums) + count.to(ACC))
    tl.store(partial + program, tl.sum(mean, 0))
    if last_to_arrive(ticket, programs):
        tl.store(total, sum_of(partial, programs, ACC, 256))


@triton.jit
def score_loss_backward_kernel(
    cotangent, scores, counts, grads, KINDS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(cotangent).to(ACC)
    for i in tl.static_range(len(KINDS)):
        count = tl.full([], counts[i], tl.int64)
        s = tl.load(scores[i] + at, mask=at < count, other=0.0).to(ACC)
        tl.store(grads[i] + at, divide(by, count.to(ACC)) * _score_slope(s, KINDS[i]), mask=at < count)


def _checked(scores: Sequence[Tensor], kinds: Sequence[int]) -> list[Tensor]:
    if not scores or len(scores) != len(kinds):
        raise RuntimeError("kinds: expected one for each tensor of scores")
    check_codes("kinds", kinds, ScoreLoss.__members__)
    if any(s.numel() == 0 for s in scores):
        raise RuntimeError("scores: expected at least one")
    check_floating(*scores)
    return [s.contiguous() for s in scores]


def score_loss(scores: Sequence[Tensor], kinds: Sequence[int]) -> Tensor:
    dense = _checked(scores, kinds)
    total, device = wide(dense[0]), dense[0].device
    longest = max(dense, key=lambda s: s.dtype == torch.float64)
    counts = tuple(s.numel() for s in dense)
    programs = min(_PROGRAMS, triton.cdiv(max(counts), 4 * _BLOCK))
    launch(
        score_loss_kernel, programs, device,
        tuple(dense), counts, total, wide(longest, programs), tickets(device, 1),
        KINDS=tuple(map(int, kinds)), ACC=accumulator(*dense), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return total


def score_loss_backward(cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int]) -> list[Tensor]:
    dense = _checked(scores, kinds)
    by, _ = spread("cotangent", cotangent, 1)
    grads = [torch.empty_like(s) for s in dense]
    counts = tuple(s.numel() for s in dense)
    launch(
        score_loss_backward_kernel, triton.cdiv(max(counts), _BLOCK), dense[0].device,
        by, tuple(dense), counts, tuple(grads),
        KINDS=tuple(map(int, kinds)), ACC=accumulator(*dense), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return grads
