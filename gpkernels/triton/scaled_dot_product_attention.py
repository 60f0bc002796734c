"""scaled_dot_product_attention, its VJP and JVP, and the derivative of the VJP, by tiles of scores.

The formulas are in ``gpkernels/ops/attention_blocks.py``. A program has some rows and goes over the keys, or some keys
and goes over the rows; each result has one writer, so there are no atomics. Tensors are (B, T, H, D) in memory. Tiles
of scores are computed again from the rows' logsumexp.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops.scaled_dot_product_attention import (
    new_statistics,
    new_tokens_first,
    scaled_dot_product_attention_backward_op,
    scaled_dot_product_attention_double_backward_op,
    scaled_dot_product_attention_jvp_op,
    scaled_dot_product_attention_op,
)
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.triton.common import check_floating, check_same, interpreted, launch

# The widest heads, beyond which tiles do not fit in registers; these go by blocks of PyTorch's products instead.
WIDEST, WIDEST_FLOAT32 = 256, 128
_NO_MASK, _BOOL, _ADDED = 0, 1, 2


# --- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(count, ROWS: tl.constexpr):
    """Return the matrix and the first row of a program."""
    blocks = tl.cdiv(count, ROWS)
    program = tl.program_id(0)
    return program // blocks, program % blocks * ROWS


@triton.jit
def _at(n, row, heads, count, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Offsets of rows of matrix n in a tensor of (B, count, heads, WIDTH), and which of them exist."""
    col = tl.arange(0, PADDED)
    base = (n // heads).to(tl.int64) * count + row
    at = (base * heads + n % heads)[:, None] * WIDTH + col[None, :]
    return at, (row < count)[:, None] & (col < WIDTH)[None, :]


@triton.jit
def _tile(x, n, row, heads, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, TYPE: tl.constexpr):
    at, exists = _at(n, row, heads, count, WIDTH, PADDED)
    return tl.load(x + at, mask=exists, other=0.0).to(TYPE)


@triton.jit
def _store(x, n, row, heads, count, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    at, exists = _at(n, row, heads, count, WIDTH, PADDED)
    tl.store(x + at, values, mask=exists)


@triton.jit
def _of_rows(x, n, row, count):
    """Load one number per row."""
    return tl.load(x + n.to(tl.int64) * count + row, mask=row < count, other=0.0)


@triton.jit
def _scores(
    q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return scale q k^T with the mask applied; -inf where a row does not see a key."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = (row < length)[:, None] & (col < keys)[None, :]
    if CAUSAL:
        seen = seen & (row[:, None] >= col[None, :])
    if MASK != 0:
        base = (n // heads).to(tl.int64) * mask_b + (n % heads).to(tl.int64) * mask_h
        at = mask + base + row.to(tl.int64)[:, None] * mask_t + col.to(tl.int64)[None, :] * mask_s
        if MASK == 1:
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            scores += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_kernel(
    query, key, value, output, logsumexp, mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64,
    heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n, first = _place(length, ROWS)
    row = first + tl.arange(0, ROWS)
    q = _tile(query, n, row, heads, length, WIDTH, PADDED, TYPE)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, VALUES_PADDED], tl.float32)
    last = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    for start in range(0, last, COLS):
        col = start + tl.arange(0, COLS)
        k = _tile(key, n, col, heads, keys, WIDTH, PADDED, TYPE)
        v = _tile(value, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        s = _scores(
            q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        now = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp(s - shift[:, None])
        before = tl.exp(largest - shift)
        total = total * before + tl.sum(p, 1)
        out = out * before[:, None] + tl.dot(p.to(TYPE), v, input_precision=PRECISION)
        largest = now
    total = tl.where(total == 0.0, 1.0, total)
    _store(output, n, row, heads, length, out / total[:, None], VALUES, VALUES_PADDED)
    statistics = tl.where(largest == float("-inf"), 0.0, largest) + tl.log(total)
    tl.store(logsumexp + n.to(tl.int64) * length + row, statistics, mask=row < length)


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_to_rows_kernel(
    query, key, value, output, logsumexp, cotangent, along, to_query,
    mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64, heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The VJP by query; also D, which the other kernel reads."""
    n, first = _place(length, ROWS)
    row = first + tl.arange(0, ROWS)
    q = _tile(query, n, row, heads, length, WIDTH, PADDED, TYPE)
    g = _tile(cotangent, n, row, heads, length, VALUES, VALUES_PADDED, tl.float32)
    d = tl.sum(g * _tile(output, n, row, heads, length, VALUES, VALUES_PADDED, tl.float32), 1)
    tl.store(along + n.to(tl.int64) * length + row, d, mask=row < length)
    lse = _of_rows(logsumexp, n, row, length)
    g = g.to(TYPE)
    to_q = tl.zeros([ROWS, PADDED], tl.float32)
    last = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    for start in range(0, last, COLS):
        col = start + tl.arange(0, COLS)
        k = _tile(key, n, col, heads, keys, WIDTH, PADDED, TYPE)
        v = _tile(value, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        s = _scores(
            q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - lse[:, None])
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None])
        to_q += tl.dot(ds.to(TYPE), k, input_precision=PRECISION)
    _store(to_query, n, row, heads, length, to_q * scale, WIDTH, PADDED)


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_to_keys_kernel(
    query, key, value, logsumexp, cotangent, along, to_key, to_value,
    mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64, heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The VJP by key and value."""
    n, first = _place(keys, COLS)
    col = first + tl.arange(0, COLS)
    k = _tile(key, n, col, heads, keys, WIDTH, PADDED, TYPE)
    v = _tile(value, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
    to_k = tl.zeros([COLS, PADDED], tl.float32)
    to_v = tl.zeros([COLS, VALUES_PADDED], tl.float32)
    begin = first // ROWS * ROWS if CAUSAL else 0
    for start in range(begin, length, ROWS):
        row = start + tl.arange(0, ROWS)
        q = _tile(query, n, row, heads, length, WIDTH, PADDED, TYPE)
        g = _tile(cotangent, n, row, heads, length, VALUES, VALUES_PADDED, TYPE)
        s = _scores(
            q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - _of_rows(logsumexp, n, row, length)[:, None])
        to_v += tl.dot(tl.trans(p.to(TYPE)), g, input_precision=PRECISION)
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - _of_rows(along, n, row, length)[:, None])
        to_k += tl.dot(tl.trans(ds.to(TYPE)), q, input_precision=PRECISION)
    _store(to_key, n, col, heads, keys, to_k * scale, WIDTH, PADDED)
    _store(to_value, n, col, heads, keys, to_v, VALUES, VALUES_PADDED)


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_jvp_kernel(
    query_tangent, key_tangent, value_tangent, query, key, value, output, logsumexp, tangent, mean,
    mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64, heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n, first = _place(length, ROWS)
    row = first + tl.arange(0, ROWS)
    q = _tile(query, n, row, heads, length, WIDTH, PADDED, TYPE)
    tq = _tile(query_tangent, n, row, heads, length, WIDTH, PADDED, TYPE)
    lse = _of_rows(logsumexp, n, row, length)
    m = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, VALUES_PADDED], tl.float32)
    last = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    for start in range(0, last, COLS):
        col = start + tl.arange(0, COLS)
        k = _tile(key, n, col, heads, keys, WIDTH, PADDED, TYPE)
        s = _scores(
            q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - lse[:, None])
        tk = _tile(key_tangent, n, col, heads, keys, WIDTH, PADDED, TYPE)
        ts = tl.dot(tq, tl.trans(k), input_precision=PRECISION) + tl.dot(q, tl.trans(tk), input_precision=PRECISION)
        moved = p * (ts * scale)
        m += tl.sum(moved, 1)
        v = _tile(value, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        tv = _tile(value_tangent, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        out += tl.dot(moved.to(TYPE), v, input_precision=PRECISION) + tl.dot(p.to(TYPE), tv, input_precision=PRECISION)
    out -= m[:, None] * _tile(output, n, row, heads, length, VALUES, VALUES_PADDED, tl.float32)
    _store(tangent, n, row, heads, length, out, VALUES, VALUES_PADDED)
    tl.store(mean + n.to(tl.int64) * length + row, m, mask=row < length)


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_bend_to_rows_kernel(
    query_tangent, key_tangent, value_tangent, query, key, value, output, tangent, logsumexp, mean, cotangent,
    along, level, to_query,
    mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64, heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The derivative of <G, O'> by query; also D and f, which the other kernel reads."""
    n, first = _place(length, ROWS)
    row = first + tl.arange(0, ROWS)
    g = _tile(cotangent, n, row, heads, length, VALUES, VALUES_PADDED, tl.float32)
    d = tl.sum(g * _tile(output, n, row, heads, length, VALUES, VALUES_PADDED, tl.float32), 1)
    f = tl.sum(g * _tile(tangent, n, row, heads, length, VALUES, VALUES_PADDED, tl.float32), 1)
    tl.store(along + n.to(tl.int64) * length + row, d, mask=row < length)
    tl.store(level + n.to(tl.int64) * length + row, f, mask=row < length)
    g = g.to(TYPE)
    q = _tile(query, n, row, heads, length, WIDTH, PADDED, TYPE)
    tq = _tile(query_tangent, n, row, heads, length, WIDTH, PADDED, TYPE)
    lse = _of_rows(logsumexp, n, row, length)
    m = _of_rows(mean, n, row, length)
    to_q = tl.zeros([ROWS, PADDED], tl.float32)
    last = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    for start in range(0, last, COLS):
        col = start + tl.arange(0, COLS)
        k = _tile(key, n, col, heads, keys, WIDTH, PADDED, TYPE)
        s = _scores(
            q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - lse[:, None])
        tk = _tile(key_tangent, n, col, heads, keys, WIDTH, PADDED, TYPE)
        ts = tl.dot(tq, tl.trans(k), input_precision=PRECISION) + tl.dot(q, tl.trans(tk), input_precision=PRECISION)
        v = _tile(value, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None]
        tv = _tile(value_tangent, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        e = tl.dot(g, tl.trans(tv), input_precision=PRECISION) - f[:, None]
        b = p * ((ts * scale - m[:, None]) * dp + e)
        to_q += tl.dot(b.to(TYPE), k, input_precision=PRECISION)
        to_q += tl.dot((p * dp).to(TYPE), tk, input_precision=PRECISION)
    _store(to_query, n, row, heads, length, to_q * scale, WIDTH, PADDED)


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_bend_to_keys_kernel(
    query_tangent, key_tangent, value_tangent, query, key, value, logsumexp, mean, cotangent, along, level,
    to_key, to_value,
    mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64, heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The derivative of <G, O'> by key and value."""
    n, first = _place(keys, COLS)
    col = first + tl.arange(0, COLS)
    k = _tile(key, n, col, heads, keys, WIDTH, PADDED, TYPE)
    tk = _tile(key_tangent, n, col, heads, keys, WIDTH, PADDED, TYPE)
    v = _tile(value, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
    tv = _tile(value_tangent, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
    to_k = tl.zeros([COLS, PADDED], tl.float32)
    to_v = tl.zeros([COLS, VALUES_PADDED], tl.float32)
    begin = first // ROWS * ROWS if CAUSAL else 0
    for start in range(begin, length, ROWS):
        row = start + tl.arange(0, ROWS)
        q = _tile(query, n, row, heads, length, WIDTH, PADDED, TYPE)
        s = _scores(
            q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - _of_rows(logsumexp, n, row, length)[:, None])
        tq = _tile(query_tangent, n, row, heads, length, WIDTH, PADDED, TYPE)
        ts = tl.dot(tq, tl.trans(k), input_precision=PRECISION) + tl.dot(q, tl.trans(tk), input_precision=PRECISION)
        ts = ts * scale - _of_rows(mean, n, row, length)[:, None]
        g = _tile(cotangent, n, row, heads, length, VALUES, VALUES_PADDED, TYPE)
        to_v += tl.dot(tl.trans((p * ts).to(TYPE)), g, input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION) - _of_rows(along, n, row, length)[:, None]
        e = tl.dot(g, tl.trans(tv), input_precision=PRECISION) - _of_rows(level, n, row, length)[:, None]
        b = p * (ts * dp + e)
        to_k += tl.dot(tl.trans(b.to(TYPE)), q, input_precision=PRECISION)
        to_k += tl.dot(tl.trans((p * dp).to(TYPE)), tq, input_precision=PRECISION)
    _store(to_key, n, col, heads, keys, to_k * scale, WIDTH, PADDED)
    _store(to_value, n, col, heads, keys, to_v, VALUES, VALUES_PADDED)


# --- launchers --------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """How a call is launched. last: the arguments that all kernels end with."""

    matrices: int
    rows: int
    keys: int
    device: torch.device
    last: tuple[Any, ...]
    constants: dict[str, Any]

    def over_rows(self, kernel: Any, *tensors: Tensor) -> None:
        programs = self.matrices * triton.cdiv(self.rows, self.constants["ROWS"])
        launch(kernel, programs, self.device, *tensors, *self.last, **self.constants)

    def over_keys(self, kernel: Any, *tensors: Tensor) -> None:
        programs = self.matrices * triton.cdiv(self.keys, self.constants["COLS"])
        launch(kernel, programs, self.device, *tensors, *self.last, **self.constants)


def _checked(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_floating(query, key, value)
    if any(x.dim() != 4 for x in (query, key, value)):
        raise RuntimeError("query, key, value: expected 4 axes each")
    batch, heads, _, width = query.shape
    keys = key.shape[2]
    if tuple(key.shape) != (batch, heads, keys, width) or tuple(value.shape[:3]) != (batch, heads, keys):
        raise RuntimeError(
            f"key, value: expected shapes {(batch, heads, keys, width)} and {(batch, heads, keys)} with any width, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"key, value: expected dtype {query.dtype}, got {key.dtype} and {value.dtype}")


def _kept(query: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor) -> None:
    shape = tuple(query.shape[:3])
    for name, x, expected, dtype in (
        ("output", output, (*shape, value.shape[3]), query.dtype),
        ("logsumexp", logsumexp, shape, accumulation_dtype(query.dtype)),
    ):
        if tuple(x.shape) != expected or x.dtype != dtype:
            raise RuntimeError(f"{name}: expected shape {expected} and {dtype}, got {tuple(x.shape)} and {x.dtype}")


def _tile_of(dtype: torch.dtype, width: int) -> tuple[int, int]:
    """Return rows and columns of a tile, and warps: the largest tile with which kernels spill little or nothing."""
    if width > (64 if dtype == torch.float32 else 128):
        return 16, 8
    return (32, 4) if dtype == torch.float32 or width > 64 else (64, 4)


def _precision() -> str:
    """Return how float32 is multiplied: by three products of TF32 where the tensor cores have it."""
    if interpreted() or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"
    return "tf32x3"


def _sizes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Sizes:
    batch, heads, length, width = query.shape
    keys, values = value.shape[2:]
    kind, strides = _NO_MASK, [0, 0, 0, 0]
    if mask is not None:
        kind = _BOOL if mask.dtype == torch.bool else _ADDED
        mask = (mask.view(torch.uint8) if kind == _BOOL else mask).expand(batch, heads, length, keys)
        strides = list(mask.stride())
    padded, values_padded = (max(16, triton.next_power_of_2(w)) for w in (width, values))
    tile, warps = _tile_of(query.dtype, max(padded, values_padded))
    # The interpreter has no products of bfloat16.
    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    kind_of_products = tl.float32 if interpreted() else kinds.get(query.dtype, tl.float32)
    constants = {
        "WIDTH": width, "PADDED": padded, "VALUES": values, "VALUES_PADDED": values_padded, "MASK": kind,
        "CAUSAL": is_causal, "TYPE": kind_of_products, "PRECISION": _precision(),
        "ROWS": tile, "COLS": tile, "num_warps": warps, "num_stages": 1,
    }  # fmt: skip
    last = (query if mask is None else mask, *strides, heads, length, keys, scale)
    return Sizes(batch * heads, length, keys, query.device, last, constants)


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """Make the tensors dense as (B, T, H, D)."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def _is_for_blocks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call is left to the blocks: float64, wider heads, nothing to do, a GPU that Triton does not support."""
    width = max(query.shape[3], value.shape[3])
    wide = width > (WIDEST_FLOAT32 if query.dtype == torch.float32 else WIDEST)
    nothing = not (query.numel() and key.numel() and value.numel())
    return query.dtype == torch.float64 or wide or nothing or not _is_supported(query.device)


@cache
def _is_supported(device: torch.device) -> bool:
    """Whether a GPU has what Triton compiles for; NVIDIA's need compute capability 8."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _checked(query, key, value)
    if _is_for_blocks(query, key, value):
        return scaled_dot_product_attention_op.implementation(query, key, value, attn_mask, is_causal, scale)
    sizes = _sizes(query, key, value, attn_mask, is_causal, scale)
    output, logsumexp = new_tokens_first(query, value.shape[3]), new_statistics(query)
    sizes.over_rows(attention_kernel, *_tokens_first(query, key, value), output, logsumexp)
    return output, logsumexp


def scaled_dot_product_attention_backward(
    cotangent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _checked(query, key, value)
    _kept(query, value, output, logsumexp)
    check_same("cotangent", cotangent, output)
    if _is_for_blocks(query, key, value):
        return scaled_dot_product_attention_backward_op.implementation(
            cotangent, query, key, value, output, logsumexp, attn_mask, is_causal, scale
        )
    sizes = _sizes(query, key, value, attn_mask, is_causal, scale)
    to_query, to_key, to_value = (new_tokens_first(x, x.shape[3]) for x in (query, key, value))
    query, key, value, output, cotangent = _tokens_first(query, key, value, output, cotangent)
    logsumexp, along = logsumexp.contiguous(), new_statistics(query)
    sizes.over_rows(attention_to_rows_kernel, query, key, value, output, logsumexp, cotangent, along, to_query)
    sizes.over_keys(attention_to_keys_kernel, query, key, value, logsumexp, cotangent, along, to_key, to_value)
    return to_query, to_key, to_value


def _check_tangents(tangents: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
    for name, t, x in zip(("query", "key", "value"), tangents, tensors, strict=True):
        check_same(f"{name}_tangent", t, x)


def scaled_dot_product_attention_jvp(
    query_tangent: Tensor,
    key_tangent: Tensor,
    value_tangent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _checked(query, key, value)
    _kept(query, value, output, logsumexp)
    tangents = query_tangent, key_tangent, value_tangent
    _check_tangents(tangents, (query, key, value))
    if _is_for_blocks(query, key, value):
        return scaled_dot_product_attention_jvp_op.implementation(
            *tangents, query, key, value, output, logsumexp, attn_mask, is_causal, scale
        )
    sizes = _sizes(query, key, value, attn_mask, is_causal, scale)
    tangent, mean = new_tokens_first(query, value.shape[3]), new_statistics(query)
    tensors = _tokens_first(*tangents, query, key, value, output)
    sizes.over_rows(attention_jvp_kernel, *tensors, logsumexp.contiguous(), tangent, mean)
    return tangent, mean


def scaled_dot_product_attention_double_backward(
    query_tangent: Tensor,
    key_tangent: Tensor,
    value_tangent: Tensor,
    cotangent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    tangent: Tensor | None,
    mean: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _checked(query, key, value)
    _kept(query, value, output, logsumexp)
    tangents = query_tangent, key_tangent, value_tangent
    _check_tangents(tangents, (query, key, value))
    check_same("cotangent", cotangent, output)
    if tangent is not None and mean is not None:
        check_same("tangent", tangent, output)
        check_same("mean", mean, logsumexp)
    call, constants = (*tangents, cotangent, query, key, value, output, logsumexp), (attn_mask, is_causal, scale)
    if _is_for_blocks(query, key, value):
        return scaled_dot_product_attention_double_backward_op.implementation(*call, tangent, mean, *constants)
    given = output.new_empty(0)
    if tangent is None or mean is None:
        kept = query, key, value, output, logsumexp
        tangent, mean = scaled_dot_product_attention_jvp(*tangents, *kept, *constants)
        given = tangent
    sizes = _sizes(query, key, value, *constants)
    to_query, to_key, to_value = (new_tokens_first(x, x.shape[3]) for x in (query, key, value))
    tq, tk, tv, query, key, value, output, cotangent, tangent = _tokens_first(
        *tangents, query, key, value, output, cotangent, tangent
    )
    logsumexp, mean, along, level = (
        logsumexp.contiguous(),
        mean.contiguous(),
        new_statistics(query),
        new_statistics(query),
    )
    sizes.over_rows(
        attention_bend_to_rows_kernel,
        *(tq, tk, tv, query, key, value, output, tangent, logsumexp, mean, cotangent, along, level, to_query),
    )
    sizes.over_keys(
        attention_bend_to_keys_kernel,
        *(tq, tk, tv, query, key, value, logsumexp, mean, cotangent, along, level, to_key, to_value),
    )
    return given, to_query, to_key, to_value
