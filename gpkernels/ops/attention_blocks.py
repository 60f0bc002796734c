"""Arithmetic of scaled dot-product attention and its derivatives, by blocks of scores.

A block has a few matrices or a few rows of one, and all keys that these see; blocks are written to memory that is used
again, so that nothing grows with the product of both lengths. All functions take (N, T, D) queries, (N, S, D) keys and
(N, S, Dv) values, N being batch times heads, and compute in at least float32.

With S = scale q k^T + mask, P = softmax(S), O = P v, a cotangent G of O and tangents marked by a dot:

- scores less their row's logsumexp, whose exponential is P, are one product of [scale q, -logsumexp] and [k, 1]; other
  rows' statistics are subtracted the same way
- VJP: D = sum_j G O, dP = G v^T, dS = P (dP - D); to q: scale dS k, to k: scale dS^T q, to v: P^T G
- JVP: S' = scale (q' k^T + q k'^T), m = sum_j P S', P' = P (S' - m), O' = P' v + P v'
- with f = sum G O', the derivative of <G, O'> by S is B = P ((S' - m) (dP - D) + G v'^T - f); so it is
  scale (B k + dS k') by q, scale (B^T q + dS^T q') by k, P'^T G by v, and O' by G
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpkernels.ops.tensors import accumulation_dtype

# Bytes of one block of scores: about four of them are in use, in a core's second-level cache.
CPU_BYTES, GPU_BYTES = 1 << 19, 1 << 26
FEWEST_ROWS = 16


class Attention(NamedTuple):
    """Arguments of a call. mask: (B or 1, H or 1, T or 1, S or 1), bool or added to the scores; heads: H."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    heads: int
    is_causal: bool
    scale: float


class Block(NamedTuple):
    """Matrices, rows and number of keys of one block of scores."""

    matrices: slice
    rows: slice
    keys: int

    def of_rows(self, x: Tensor) -> Tensor:
        return x[self.matrices, self.rows]

    def of_keys(self, x: Tensor) -> Tensor:
        return x[self.matrices, : self.keys]


class Blocks:
    """Blocks of a call, and memory for their scores."""

    def __init__(self, a: Attention) -> None:
        self.a, self.dtype = a, accumulation_dtype(a.query.dtype)
        (self.count, self.length), self.keys = a.query.shape[:2], a.key.shape[1]
        on_cpu = a.query.device.type == "cpu"
        size = (CPU_BYTES if on_cpu else GPU_BYTES) // self.dtype.itemsize
        # Rows depend on the shape alone, matrices also on the number of threads: no sum depends on that.
        self.rows = max(1, min(self.length, max(FEWEST_ROWS, size // max(1, self.keys))))
        together = (torch.get_num_threads() if on_cpu else 1) * size // max(1, self.rows * self.keys)
        self.matrices = max(1, min(self.count, together))

    def __iter__(self) -> Iterator[Block]:
        if not self.keys:
            return
        for n in range(0, self.count, self.matrices):
            for row in range(0, self.length, self.rows):
                last = min(row + self.rows, self.length)
                keys = min(self.keys, last) if self.a.is_causal else self.keys
                yield Block(slice(n, min(n + self.matrices, self.count)), slice(row, last), keys)

    def memory(self) -> Tensor:
        """Allocate memory for one block."""
        return self.a.query.new_empty(self.matrices * self.rows * self.keys, dtype=self.dtype)

    def product(self, left: Tensor, right: Tensor, block: Block, memory: Tensor) -> Tensor:
        """Compute the block of left right^T."""
        n, rows = block.matrices.stop - block.matrices.start, block.rows.stop - block.rows.start
        out = memory[: n * rows * block.keys].view(n, rows, block.keys)
        return torch.bmm(block.of_rows(left), block.of_keys(right).mT, out=out)

    def hide(self, scores: Tensor, block: Block) -> Tensor:
        """Apply the mask to a block of scores, in place."""
        a, (n, rows, keys) = self.a, block
        if a.is_causal and keys > rows.start:
            corner = scores[..., rows.start :]
            seen = torch.ones(corner.shape[1:], dtype=torch.bool, device=scores.device).tril_()
            corner.masked_fill_(seen.logical_not_(), -torch.inf)
        if a.mask is not None:
            mask = a.mask[..., rows, :] if a.mask.shape[2] > 1 else a.mask
            if a.mask.shape[0] > 1 or a.mask.shape[1] > 1:
                places = torch.arange(n.start, n.stop, device=scores.device)
                batch, head = places // a.heads, places % a.heads
                mask = mask[batch if a.mask.shape[0] > 1 else 0, head if a.mask.shape[1] > 1 else 0]
            else:
                mask = mask[0]
            if mask.dtype == torch.bool:
                scores.masked_fill_(mask.logical_not(), -torch.inf)
            else:
                scores += mask
        return scores

    def probabilities(self, left: Tensor, right: Tensor, block: Block, memory: Tensor) -> Tensor:
        return self.hide(self.product(left, right, block, memory), block).exp_()

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.dtype, device=like.device)

    def wide(self, *parts: Tensor) -> Tensor:
        """Join the parts along the last axis, in the dtype of sums."""
        return torch.cat([x.to(self.dtype) for x in parts], -1)

    def ones(self, like: Tensor) -> Tensor:
        return like.new_ones((*like.shape[:-1], 1), dtype=self.dtype)


def attention(a: Attention) -> tuple[Tensor, Tensor]:
    """Compute O and the rows' logsumexp, both 0 for rows that see no key."""
    blocks = Blocks(a)
    query, key, value = blocks.wide(a.query * a.scale), blocks.wide(a.key), blocks.wide(a.value)
    output = query.new_zeros((*query.shape[:2], value.shape[2]))
    logsumexp = query.new_zeros(query.shape[:2])
    memory = blocks.memory()
    for block in blocks:
        scores = blocks.hide(blocks.product(query, key, block, memory), block)
        largest = scores.amax(-1, keepdim=True)
        largest.masked_fill_(largest == -torch.inf, 0)
        total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1)
        output[block[:2]] = torch.bmm(scores, block.of_keys(value)).div_(total)
        logsumexp[block[:2]] = (largest + total.log()).squeeze(-1)
    return output.to(a.query.dtype), logsumexp


def _rows_sum(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) * b.to(dtype)).sum(-1, keepdim=True)


def vjp(a: Attention, output: Tensor, logsumexp: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the cotangents of query, key and value."""
    blocks = Blocks(a)
    width = a.query.shape[2]
    query = blocks.wide(a.query * a.scale, -logsumexp[..., None])
    key, value = (blocks.wide(x, blocks.ones(x)) for x in (a.key, a.value))
    along = _rows_sum(cotangent, output, blocks.dtype)
    cotangent = blocks.wide(cotangent, -along)
    to_query, to_key, to_value = (blocks.zeros(x) for x in a[:3])
    memory = blocks.memory(), blocks.memory()
    for block in blocks:
        p = blocks.probabilities(query, key, block, memory[0])
        block.of_keys(to_value).baddbmm_(p.mT, block.of_rows(cotangent)[..., :-1])
        ds = blocks.product(cotangent, value, block, memory[1]).mul_(p)
        to_query[block[:2]] = torch.bmm(ds, block.of_keys(key)[..., :width])
        block.of_keys(to_key).baddbmm_(ds.mT, block.of_rows(query)[..., :width])
    return to_query.mul_(a.scale).to(a.query.dtype), to_key.to(a.key.dtype), to_value.to(a.value.dtype)


def jvp(
    a: Attention, output: Tensor, logsumexp: Tensor, tangents: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute O' and m."""
    blocks = Blocks(a)
    width = a.query.shape[2]
    tq, tk, tv = tangents
    query = blocks.wide(tq * a.scale, a.query * a.scale, -logsumexp[..., None])
    key, value, tv = blocks.wide(a.key, tk), blocks.wide(a.value), blocks.wide(tv)
    ones = blocks.wide(a.key, blocks.ones(a.key))
    tangent, mean = blocks.zeros(output), blocks.zeros(logsumexp)
    memory = blocks.memory(), blocks.memory()
    for block in blocks:
        p = blocks.probabilities(query[..., width:], ones, block, memory[0])
        moved = blocks.product(query[..., :-1], key, block, memory[1]).mul_(p)
        m = moved.sum(-1, keepdim=True)
        out = torch.bmm(moved, block.of_keys(value)).baddbmm_(p, block.of_keys(tv))
        tangent[block[:2]] = out.addcmul_(block.of_rows(output).to(blocks.dtype), m, value=-1)
        mean[block[:2]] = m.squeeze(-1)
    return tangent.to(output.dtype), mean


def double_backward(
    a: Attention,
    output: Tensor,
    logsumexp: Tensor,
    cotangent: Tensor,
    tangents: tuple[Tensor, Tensor, Tensor],
    known: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the derivatives of <G, O'> by G, which is O', query, key and value; known: O' and m, by ``jvp``."""
    blocks = Blocks(a)
    dtype, width = blocks.dtype, a.query.shape[2]
    tq, tk, tv = tangents
    query = blocks.wide(tq * a.scale, a.query * a.scale, -logsumexp[..., None])
    key = blocks.wide(a.key, tk)
    ones = blocks.wide(a.key, blocks.ones(a.key))
    value, tv = (blocks.wide(x, blocks.ones(x)) for x in (a.value, tv))
    along = _rows_sum(cotangent, output, dtype)
    given = blocks.wide(cotangent, -along)
    tangent, mean = known if known is not None else (blocks.zeros(output), blocks.zeros(logsumexp))
    to_query, to_key, to_value = (blocks.zeros(x) for x in a[:3])
    memory = [blocks.memory() for _ in range(4)]
    for block in blocks:
        g = block.of_rows(given)
        p = blocks.probabilities(query[..., width:], ones, block, memory[0])
        ts = blocks.product(query[..., :-1], key, block, memory[1])
        tp = memory[2][: p.numel()].view_as(p)
        m = block.of_rows(mean)[..., None] if known else torch.mul(p, ts, out=tp).sum(-1, keepdim=True)
        torch.mul(p, ts.sub_(m), out=tp)
        block.of_keys(to_value).baddbmm_(tp.mT, g[..., :-1])
        if known is None:
            out = torch.bmm(tp, block.of_keys(value)[..., :-1]).baddbmm_(p, block.of_keys(tv)[..., :-1])
            tangent[block[:2]] = out
        f = _rows_sum(g[..., :-1], block.of_rows(tangent), dtype)
        ds = blocks.product(given, value, block, memory[3])
        b = torch.bmm(torch.cat([g[..., :-1], -f], -1), block.of_keys(tv).mT, out=tp)
        b.addcmul_(ts, ds).mul_(p)
        ds.mul_(p)
        out = torch.bmm(b, block.of_keys(key)[..., :width])
        to_query[block[:2]] = out.baddbmm_(ds, block.of_keys(key)[..., width:])
        rows = block.of_rows(query)
        block.of_keys(to_key).baddbmm_(b.mT, rows[..., width:-1]).baddbmm_(ds.mT, rows[..., :width])
    to_query.mul_(a.scale)
    to_cotangent = output.new_empty(0) if known is not None else tangent.to(output.dtype)
    return to_cotangent, to_query.to(a.query.dtype), to_key.to(a.key.dtype), to_value.to(a.value.dtype)
