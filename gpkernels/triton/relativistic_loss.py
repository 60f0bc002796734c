"""relativistic loss: mean softplus(fake - real) over pairs of scores, and its derivative by both; a launch each."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import (
    accumulator,
    begin_of_block,
    check_floating,
    check_same,
    dense,
    empty_like,
    flat_sizes,
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
def _lead(real, fake, at, mask, ACC: tl.constexpr):
    return tl.load(fake + at, mask=mask, other=0.0).to(ACC) - tl.load(real + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def relativistic_loss_kernel(
    real, fake, total, partial, ticket, count, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    count = tl.full([], count, tl.int64)
    sums = tl.zeros([BLOCK], ACC)
    for first in range(program * BLOCK, count, programs * BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.where(at < count, softplus(_lead(real, fake, at, at < count, ACC)), 0.0)
    tl.store(partial + program, tl.sum(sums, 0))
    if last_to_arrive(ticket, programs):
        tl.store(total, divide(sum_of(partial, programs, ACC, 256), count.to(ACC)))


@triton.jit
def relativistic_loss_backward_kernel(
    cotangent, real, fake, to_real, to_fake, count, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = begin_of_block(BLOCK) + tl.arange(0, BLOCK)
    count = tl.full([], count, tl.int64)
    scale = divide(tl.load(cotangent).to(ACC), count.to(ACC))
    slope = scale * sigmoid(_lead(real, fake, at, at < count, ACC))
    tl.store(to_real + at, -slope, mask=at < count)
    tl.store(to_fake + at, slope, mask=at < count)


def _checked(real_scores: Tensor, fake_scores: Tensor) -> list[Tensor]:
    check_floating(real_scores)
    if real_scores.numel() == 0:
        raise RuntimeError("real_scores: expected at least one")
    check_same("fake_scores", fake_scores, real_scores)
    return dense(real_scores, fake_scores)


def relativistic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    real, fake = _checked(real_scores, fake_scores)
    total, count, device = wide(real), real.numel(), real.device
    programs = min(_PROGRAMS, triton.cdiv(count, 4 * _BLOCK))
    launch(
        relativistic_loss_kernel, programs, device,
        real, fake, total, wide(real, programs), tickets(device, 1), count,
        ACC=accumulator(real), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return total


def relativistic_loss_backward(cotangent: Tensor, real_scores: Tensor, fake_scores: Tensor) -> tuple[Tensor, Tensor]:
    real, fake = _checked(real_scores, fake_scores)
    by, _ = spread("cotangent", cotangent, 1)
    to_real, to_fake = empty_like(real), empty_like(fake)
    programs, sizes = flat_sizes(real, real.numel())
    launch(
        relativistic_loss_backward_kernel, programs, real.device,
        by, real, fake, to_real, to_fake, real.numel(), ACC=accumulator(real), **sizes,
    )  # fmt: skip
    return to_real, to_fake
