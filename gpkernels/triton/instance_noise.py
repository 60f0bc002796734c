"""instance_noise: x + sigma * scale * xi, four random numbers per Philox call."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import (
    accumulator,
    begin_of_block,
    check_floating,
    check_key,
    dense,
    empty_like,
    flat_sizes,
    launch,
    spread,
)
from gpkernels.triton.philox import random_numbers


@triton.jit
def _add(x, out, noise, at, mask, ACC: tl.constexpr):
    tl.store(out + at, tl.load(x + at, mask=mask).to(ACC) + noise, mask=mask)


@triton.jit(do_not_specialize=["count"])
def instance_noise_kernel(
    x, scale, key, out, count: tl.int64, sigma: tl.float64,
    ACC: tl.constexpr, BLOCK: tl.constexpr, GAUSSIAN: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    start = begin_of_block(BLOCK)
    amplitude = tl.full([], sigma, ACC)
    if SCALED:
        amplitude *= tl.load(scale).to(ACC)
    noise = amplitude * random_numbers(key, start // 4 + tl.arange(0, BLOCK // 4), ACC, GAUSSIAN)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        _add(x, out, noise, at, None, ACC)
    else:
        _add(x, out, noise, at, at < count, ACC)


def instance_noise(x: Tensor, sigma: float, scale: Tensor | None, key: Tensor, gaussian: bool) -> Tensor:
    check_floating(x)
    check_key(key)
    by = key if scale is None else spread("scale", scale, 1)[0]
    (x,) = dense(x)
    out = empty_like(x)
    programs, sizes = flat_sizes(x, x.numel())
    launch(
        instance_noise_kernel, programs, x.device, x, by, key, out, x.numel(), float(sigma),
        ACC=accumulator(x), GAUSSIAN=bool(gaussian), SCALED=scale is not None, **sizes,
    )  # fmt: skip
    return out
