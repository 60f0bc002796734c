"""Triton kernels of scaled_dot_product_attention, its VJP and JVP, and the derivative of the VJP, by tiles of scores.

The formulas are in ``gpkernels/ops/attention_blocks.py``. A program has some rows and goes over the keys, or some keys
and goes over the rows; each result has one writer, so there are no atomics. Tensors are (B, T, H, D) in memory. Tiles
of scores are computed again from the rows' logsumexp.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

# --- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(count, ROWS: tl.constexpr):
    """Return the matrix and the first row of a program."""
    blocks = tl.cdiv(count, ROWS)
    program = tl.program_id(0)
    return program // blocks, program % blocks * ROWS


@triton.jit
def _at(n, row, heads, count, first, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Offsets of a chunk of rows of matrix n in a tensor of (B, count, heads, WIDTH), and which of them exist."""
    col = first + tl.arange(0, CHUNK)
    base = (n // heads).to(tl.int64) * count + row
    at = (base * heads + n % heads)[:, None] * WIDTH + col[None, :]
    return at, (row < count)[:, None] & (col < WIDTH)[None, :]


@triton.jit
def _chunk(x, n, row, heads, count, first, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr):
    at, exists = _at(n, row, heads, count, first, WIDTH, CHUNK)
    return tl.load(x + at, mask=exists, other=0.0).to(TYPE)


@triton.jit
def _tile(x, n, row, heads, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, TYPE: tl.constexpr):
    return _chunk(x, n, row, heads, count, 0, WIDTH, PADDED, TYPE)


@triton.jit
def _store(x, n, row, heads, count, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    at, exists = _at(n, row, heads, count, 0, WIDTH, PADDED)
    tl.store(x + at, values, mask=exists)


@triton.jit
def _of_rows(x, n, row, count):
    """Load one number per row."""
    return tl.load(x + n.to(tl.int64) * count + row, mask=row < count, other=0.0)


@triton.jit
def _product(
    x, y, x_tile, y_tile, n, row, col, heads, length, keys,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x y^T, of rows of x and keys of y: of whole tiles, or chunk by chunk of the width, loaded here.

    Each warp has in registers all that it reads of x. Of tiles that nothing reads the compiler leaves out the loads.
    """
    if CHUNK >= PADDED:
        product = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
    else:
        product = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
        for first in range(0, WIDTH, CHUNK):
            x_chunk = _chunk(x, n, row, heads, length, first, WIDTH, CHUNK, TYPE)
            y_chunk = _chunk(y, n, col, heads, keys, first, WIDTH, CHUNK, TYPE)
            product = tl.dot(x_chunk, tl.trans(y_chunk), product, input_precision=PRECISION)
    return product


@triton.jit
def _scores(
    query, key, q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return scale q k^T with the mask applied; -inf where a row does not see a key."""
    scores = _product(query, key, q, k, n, row, col, heads, length, keys, WIDTH, PADDED, CHUNK, TYPE, PRECISION)
    scores *= scale
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
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
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
            query, key, q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            WIDTH, PADDED, CHUNK, MASK, CAUSAL, TYPE, PRECISION,
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
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
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
            query, key, q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            WIDTH, PADDED, CHUNK, MASK, CAUSAL, TYPE, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - lse[:, None])
        dp = _product(
            cotangent, value, g, v, n, row, col, heads, length, keys, VALUES, VALUES_PADDED, CHUNK, TYPE, PRECISION
        )
        ds = p * (dp - d[:, None])
        to_q += tl.dot(ds.to(TYPE), k, input_precision=PRECISION)
    _store(to_query, n, row, heads, length, to_q * scale, WIDTH, PADDED)


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_to_keys_kernel(
    query, key, value, logsumexp, cotangent, along, to_key, to_value,
    mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64, heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
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
            query, key, q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            WIDTH, PADDED, CHUNK, MASK, CAUSAL, TYPE, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - _of_rows(logsumexp, n, row, length)[:, None])
        to_v += tl.dot(tl.trans(p.to(TYPE)), g, input_precision=PRECISION)
        dp = _product(
            cotangent, value, g, v, n, row, col, heads, length, keys, VALUES, VALUES_PADDED, CHUNK, TYPE, PRECISION
        )
        ds = p * (dp - _of_rows(along, n, row, length)[:, None])
        to_k += tl.dot(tl.trans(ds.to(TYPE)), q, input_precision=PRECISION)
    _store(to_key, n, col, heads, keys, to_k * scale, WIDTH, PADDED)
    _store(to_value, n, col, heads, keys, to_v, VALUES, VALUES_PADDED)


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_t", "mask_s"])
def attention_jvp_kernel(
    query_tangent, key_tangent, value_tangent, query, key, value, output, logsumexp, tangent, mean,
    mask, mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64, heads, length, keys, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
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
            query, key, q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            WIDTH, PADDED, CHUNK, MASK, CAUSAL, TYPE, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - lse[:, None])
        tk = _tile(key_tangent, n, col, heads, keys, WIDTH, PADDED, TYPE)
        ts = _product(
            query_tangent, key, tq, k, n, row, col, heads, length, keys, WIDTH, PADDED, CHUNK, TYPE, PRECISION
        )
        ts += _product(
            query, key_tangent, q, tk, n, row, col, heads, length, keys, WIDTH, PADDED, CHUNK, TYPE, PRECISION
        )
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
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
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
            query, key, q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            WIDTH, PADDED, CHUNK, MASK, CAUSAL, TYPE, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - lse[:, None])
        tk = _tile(key_tangent, n, col, heads, keys, WIDTH, PADDED, TYPE)
        ts = _product(
            query_tangent, key, tq, k, n, row, col, heads, length, keys, WIDTH, PADDED, CHUNK, TYPE, PRECISION
        )
        ts += _product(
            query, key_tangent, q, tk, n, row, col, heads, length, keys, WIDTH, PADDED, CHUNK, TYPE, PRECISION
        )
        v = _tile(value, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        dp = _product(
            cotangent, value, g, v, n, row, col, heads, length, keys, VALUES, VALUES_PADDED, CHUNK, TYPE, PRECISION
        )
        dp -= d[:, None]
        tv = _tile(value_tangent, n, col, heads, keys, VALUES, VALUES_PADDED, TYPE)
        e = _product(
            cotangent, value_tangent, g, tv, n, row, col, heads, length, keys,
            VALUES, VALUES_PADDED, CHUNK, TYPE, PRECISION,
        )  # fmt: skip
        e -= f[:, None]
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
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
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
            query, key, q, k, n, row, col, heads, length, keys, mask, mask_b, mask_h, mask_t, mask_s, scale,
            WIDTH, PADDED, CHUNK, MASK, CAUSAL, TYPE, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - _of_rows(logsumexp, n, row, length)[:, None])
        tq = _tile(query_tangent, n, row, heads, length, WIDTH, PADDED, TYPE)
        ts = _product(
            query_tangent, key, tq, k, n, row, col, heads, length, keys, WIDTH, PADDED, CHUNK, TYPE, PRECISION
        )
        ts += _product(
            query, key_tangent, q, tk, n, row, col, heads, length, keys, WIDTH, PADDED, CHUNK, TYPE, PRECISION
        )
        ts = ts * scale - _of_rows(mean, n, row, length)[:, None]
        g = _tile(cotangent, n, row, heads, length, VALUES, VALUES_PADDED, TYPE)
        to_v += tl.dot(tl.trans((p * ts).to(TYPE)), g, input_precision=PRECISION)
        dp = _product(
            cotangent, value, g, v, n, row, col, heads, length, keys, VALUES, VALUES_PADDED, CHUNK, TYPE, PRECISION
        )
        dp -= _of_rows(along, n, row, length)[:, None]
        e = _product(
            cotangent, value_tangent, g, tv, n, row, col, heads, length, keys,
            VALUES, VALUES_PADDED, CHUNK, TYPE, PRECISION,
        )  # fmt: skip
        e -= _of_rows(level, n, row, length)[:, None]
        b = p * (ts * dp + e)
        to_k += tl.dot(tl.trans(b.to(TYPE)), q, input_precision=PRECISION)
        to_k += tl.dot(tl.trans((p * dp).to(TYPE)), tq, input_precision=PRECISION)
    _store(to_key, n, col, heads, keys, to_k * scale, WIDTH, PADDED)
    _store(to_value, n, col, heads, keys, to_v, VALUES, VALUES_PADDED)
