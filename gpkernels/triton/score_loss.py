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
from gpkernels.triton.functions import divide, sigmoid, softplus

_BLOCK, _PROGRAMS = 1024, 256


@triton.jit
def _relu(x):
    """max(0, x); NaN stays NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _score_value(s, target, KIND: tl.constexpr):
    """phi(s), by ``ScoreLoss``."""
    if KIND == 0:
        value = s
    elif KIND == 1:
        value = -s
    elif KIND == 2:
        value = softplus(s)
    elif KIND == 3:
        value = softplus(-s)
    elif KIND == 4:
        value = -softplus(s)
    elif KIND == 5:
        value = _relu(1.0 + s)
    elif KIND == 6:
        value = _relu(1.0 - s)
    else:
        value = (s - target) * (s - target)
    return value


@triton.jit
def _score_slope(s, target, KIND: tl.constexpr):
    """phi'(s)."""
    if KIND == 0:
        slope = tl.zeros_like(s) + 1.0
    elif KIND == 1:
        slope = tl.zeros_like(s) - 1.0
    elif KIND == 2:
        slope = sigmoid(s)
    elif KIND == 3:
        slope = -sigmoid(-s)
    elif KIND == 4:
        slope = -sigmoid(s)
    elif KIND == 5:
        slope = tl.where(1.0 + s <= 0.0, 0.0, 1.0).to(s.dtype)
    elif KIND == 6:
        slope = tl.where(1.0 - s <= 0.0, 0.0, -1.0).to(s.dtype)
    else:
        slope = 2.0 * (s - target)
    return slope


@triton.jit
def score_loss_kernel(
    scores, counts, total, partial, ticket, first_target: tl.float64, second_target: tl.float64,
    KINDS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    mean = tl.zeros([BLOCK], ACC)
    for i in tl.static_range(len(KINDS)):
        count = tl.full([], counts[i], tl.int64)
        target = tl.full([], first_target if i == 0 else second_target, ACC)
        sums = tl.zeros([BLOCK], ACC)
        for first in range(program * BLOCK, count, programs * BLOCK):
            at = first + tl.arange(0, BLOCK)
            s = tl.load(scores[i] + at, mask=at < count, other=0.0).to(ACC)
            sums += tl.where(at < count, _score_value(s, target, KINDS[i]), 0.0)
        mean += divide(sums, tl.zeros_like(sums) + count.to(ACC))
    tl.store(partial + program, tl.sum(mean, 0))
    if last_to_arrive(ticket, programs):
        tl.store(total, sum_of(partial, programs, ACC, 256))


@triton.jit
def score_loss_backward_kernel(
    cotangent, scores, counts, grads, first_target: tl.float64, second_target: tl.float64,
    KINDS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(cotangent).to(ACC)
    for i in tl.static_range(len(KINDS)):
        count = tl.full([], counts[i], tl.int64)
        target = tl.full([], first_target if i == 0 else second_target, ACC)
        s = tl.load(scores[i] + at, mask=at < count, other=0.0).to(ACC)
        tl.store(grads[i] + at, divide(by, count.to(ACC)) * _score_slope(s, target, KINDS[i]), mask=at < count)


def _checked(
    scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]
) -> tuple[list[Tensor], list[float]]:
    """The scores in memory order, and two targets."""
    if len(scores) not in (1, 2):  # of real and fake scores
        raise RuntimeError("scores: expected one tensor or two")
    for name, given in (("kinds", kinds), ("targets", targets)):
        if len(given) != len(scores):
            raise RuntimeError(f"{name}: expected one for each tensor of scores")
    check_codes("kinds", kinds, ScoreLoss.__members__)
    if any(s.numel() == 0 for s in scores):
        raise RuntimeError("scores: expected at least one")
    check_floating(*scores)
    return [s.contiguous() for s in scores], [float(target) for target in (targets[0], targets[-1])]


def score_loss(scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]) -> Tensor:
    dense, pair = _checked(scores, kinds, targets)
    total, device = wide(dense[0]), dense[0].device
    longest = max(dense, key=lambda s: s.dtype == torch.float64)
    counts = tuple(s.numel() for s in dense)
    programs = min(_PROGRAMS, triton.cdiv(max(counts), 4 * _BLOCK))
    launch(
        score_loss_kernel, programs, device,
        tuple(dense), counts, total, wide(longest, programs), tickets(device, 1), *pair,
        KINDS=tuple(map(int, kinds)), ACC=accumulator(*dense), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return total


def score_loss_backward(
    cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]
) -> list[Tensor]:
    dense, pair = _checked(scores, kinds, targets)
    by, _ = spread("cotangent", cotangent, 1)
    grads = [torch.empty_like(s) for s in dense]
    counts = tuple(s.numel() for s in dense)
    launch(
        score_loss_backward_kernel, triton.cdiv(max(counts), _BLOCK), dense[0].device,
        by, tuple(dense), counts, tuple(grads), *pair,
        KINDS=tuple(map(int, kinds)), ACC=accumulator(*dense), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return grads
