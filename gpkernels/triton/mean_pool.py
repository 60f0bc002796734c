"""mean_pool: means of h x w windows that tile each image, and the backward, which broadcasts a window's cotangent.

An image in memory is rows of windows; each element is a vector of ``lanes``: the channels if channels_last, else one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops.tensors import memory_format
from gpkernels.triton.common import accumulator, aligned, begin_of_block, check_floating, hinted, launch


@triton.jit
def _windows(
    start, count, cols, lanes, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    NARROW: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Windows of a block: their offsets in the pooled tensor, a mask, and their first elements in the image."""
    at = start + tl.arange(0, BLOCK)
    mask = at < hinted(count, ALIGNED)
    if NARROW:  # 32-bit divisions
        at, cols, lanes = at.to(tl.int32), cols.to(tl.int32), lanes.to(tl.int32)
    if PIXELS:
        first = (at // cols * H * cols + at % cols) * W
    else:
        window = at // hinted(lanes, ALIGNED)
        first = (window // cols * H * cols + window % cols) * W * hinted(lanes, ALIGNED) + at % hinted(lanes, ALIGNED)
    return at, mask, first


@triton.jit(do_not_specialize=["count", "cols", "lanes"])
def mean_pool_kernel(
    x, y, count: tl.int64, cols: tl.int64, lanes: tl.int64, ACC: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, PADDED: tl.constexpr, PIXELS: tl.constexpr, NARROW: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    at, mask, first = _windows(begin_of_block(BLOCK), count, cols, lanes, H, W, BLOCK, PIXELS, NARROW, ALIGNED)
    lanes = hinted(lanes, ALIGNED and not PIXELS)
    stride = cols * W * lanes
    if PIXELS:  # the row of a window is contiguous
        k = tl.arange(0, PADDED)[None, :]
        sums = tl.zeros([BLOCK, PADDED], ACC)
        for r in range(H):
            sums += tl.load(x + (first + r * stride)[:, None] + k, mask=mask[:, None] & (k < W), other=0.0).to(ACC)
        total = tl.sum(sums, 1)
    else:
        total = tl.zeros([BLOCK], ACC)
        for r in range(H):
            for k in range(W):
                total += tl.load(x + first + r * stride + k * lanes, mask=mask, other=0.0).to(ACC)
    tl.store(y + at, total * (1.0 / (H * W)), mask=mask)


@triton.jit(do_not_specialize=["count", "cols", "lanes"])
def mean_pool_backward_kernel(
    cotangent, x, count: tl.int64, cols: tl.int64, lanes: tl.int64, ACC: tl.constexpr, BLOCK: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr, PIXELS: tl.constexpr, NARROW: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    at, mask, first = _windows(begin_of_block(BLOCK), count, cols, lanes, H, W, BLOCK, PIXELS, NARROW, ALIGNED)
    lanes = hinted(lanes, ALIGNED and not PIXELS)
    stride = cols * W * lanes
    share = tl.load(cotangent + at, mask=mask).to(ACC) * (1.0 / (H * W))
    if PIXELS:
        k = tl.arange(0, PADDED)[None, :]
        spread = share[:, None] + tl.zeros([BLOCK, PADDED], ACC)
        for r in range(H):
            tl.store(x + (first + r * stride)[:, None] + k, spread, mask=mask[:, None] & (k < W))
    else:
        for r in range(H):
            for k in range(W):
                tl.store(x + first + r * stride + k * lanes, share, mask=mask)


def _format(x: Tensor, h: int, w: int) -> torch.memory_format:
    check_floating(x)
    if x.dim() < 2:
        raise RuntimeError(f"x: expected images (*, H, W), got shape {tuple(x.shape)}")
    if h <= 0 or w <= 0:
        raise RuntimeError(f"h, w: expected windows of at least one pixel, got {h} x {w}")
    return memory_format(x) if x.dim() == 4 else torch.contiguous_format


def _resized(x: Tensor, rows: int, cols: int, layout: torch.memory_format) -> Tensor:
    out = x.new_empty((*x.shape[:-2], rows, cols))
    return out if out.is_contiguous(memory_format=layout) else torch.empty_like(out, memory_format=layout)


def _run(kernel: Any, source: Tensor, out: Tensor, layout: torch.memory_format, h: int, w: int) -> None:
    small, large = sorted((source, out), key=Tensor.numel)
    lanes = 1 if layout == torch.contiguous_format else small.shape[1]
    padded = triton.next_power_of_2(w)
    block = max(32, 1024 // padded) if lanes == 1 else 1024
    launch(
        kernel, triton.cdiv(small.numel(), block), source.device, source, out, small.numel(), small.shape[-1], lanes,
        ACC=accumulator(source), BLOCK=block, H=h, W=w, PADDED=padded, PIXELS=lanes == 1,
        NARROW=large.numel() < 2**31 - 2**16, ALIGNED=aligned(lanes if lanes > 1 else small.numel()), num_warps=4,
    )  # fmt: skip


def mean_pool(x: Tensor, h: int, w: int) -> Tensor:
    layout = _format(x, h, w)
    if x.shape[-2] % h or x.shape[-1] % w:
        raise RuntimeError(f"x: expected images that windows of {h} x {w} tile, got shape {tuple(x.shape)}")
    dense = x.contiguous(memory_format=layout)
    out = _resized(x, x.shape[-2] // h, x.shape[-1] // w, layout)
    _run(mean_pool_kernel, dense, out, layout, h, w)
    return out


def mean_pool_backward(cotangent: Tensor, h: int, w: int) -> Tensor:
    layout = _format(cotangent, h, w)
    dense = cotangent.contiguous(memory_format=layout)
    out = _resized(cotangent, cotangent.shape[-2] * h, cotangent.shape[-1] * w, layout)
    _run(mean_pool_backward_kernel, dense, out, layout, h, w)
    return out
