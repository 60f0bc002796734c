"""Arithmetic of scaled dot-product attention and its derivatives, by blocks of scores.

A block has a few matrices or a few rows of one, and all keys that these see; blocks are written to memory that is used
again, so that nothing grows with the product of both lengths. All functions take (N, T, D) queries, (N, S, D) keys and
(N, S, Dv) values, N being batch times heads, and compute in at least float32.

With S = scale q k^T + mask, P = softmax(S), O = P v, a cotangent G of O and tangents marked by a prime:

- VJP: D = sum_j G O, dP = G v^T, dS = P (dP - D); to q: scale dS k, to k: scale dS^T q, to v: P^T G
- JVP: S' = scale (q' k^T + q k'^T), m = sum_j P S', P' = P (S' - m), O' = P' v + P v'
- with f = sum G O', the derivative of <G, O'> by S is B = P ((S' - m) (dP - D) + G v'^T - f); so it is
  scale (B k + dS k') by q, scale (B^T q + dS^T q') by k, P'^T G by v, and O' by G
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        parts = math.ceil(self.count / max(1, together))
        self.matrices = math.ceil(self.count / max(1, parts))

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

    def product(self, left: Tensor, right: Tensor, block: Block, memory: Tensor, scale: float = 1) -> Tensor:
        """Compute the block of scale left right^T."""
        n, rows = block.matrices.stop - block.matrices.start, block.rows.stop - block.rows.start
        out = memory[: n * rows * block.keys].view(n, rows, block.keys)
        return torch.baddbmm(out, block.of_rows(left), block.of_keys(right).mT, beta=0, alpha=scale, out=out)

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

    def scores(self, query: Tensor, key: Tensor, block: Block, memory: Tensor) -> Tensor:
        """Compute the block of S."""
        return self.hide(self.product(query, key, block, memory, self.a.scale), block)

    def probabilities(self, query: Tensor, key: Tensor, logsumexp: Tensor, block: Block, memory: Tensor) -> Tensor:
        """Compute the block of P."""
        return self.scores(query, key, block, memory).sub_(block.of_rows(logsumexp)[..., None]).exp_()

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.dtype, device=like.device)

    def wide(self, *tensors: Tensor) -> list[Tensor]:
        """Convert to the dtype of sums."""
        return [x.to(self.dtype) for x in tensors]


def attention(a: Attention) -> tuple[Tensor, Tensor]:
    """Compute O and the rows' logsumexp, both 0 for rows that see no key."""
    blocks = Blocks(a)
    query, key, value = blocks.wide(*a[:3])
    output = query.new_zeros((*query.shape[:2], value.shape[2]))
    logsumexp = query.new_zeros(query.shape[:2])
    memory = blocks.memory()
    for block in blocks:
        scores = blocks.scores(query, key, block, memory)
        largest = scores.amax(-1, keepdim=True)
        largest.masked_fill_(largest == -torch.inf, 0)
        total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1)
        output[block[:2]] = torch.bmm(scores, block.of_keys(value)).div_(total)
        logsumexp[block[:2]] = (largest + total.log()).squeeze(-1)
    return output.to(a.query.dtype), logsumexp


def vjp(a: Attention, logsumexp: Tensor, cotangent: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the cotangents of query, key and value; along: D."""
    blocks = Blocks(a)
    query, key, value, given = blocks.wide(*a[:3], cotangent)
    to_query, to_key, to_value = (blocks.zeros(x) for x in a[:3])
    memory = blocks.memory(), blocks.memory()
    for block in blocks:
        p = blocks.probabilities(query, key, logsumexp, block, memory[0])
        block.of_keys(to_value).baddbmm_(p.mT, block.of_rows(given))
        ds = blocks.product(given, value, block, memory[1]).sub_(block.of_rows(along)[..., None]).mul_(p)
        to_query[block[:2]] = torch.bmm(ds, block.of_keys(key))
        block.of_keys(to_key).baddbmm_(ds.mT, block.of_rows(query), alpha=a.scale)
    return to_query.mul_(a.scale).to(a.query.dtype), to_key.to(a.key.dtype), to_value.to(a.value.dtype)


def _moved(
    blocks: Blocks, query: Tensor, key: Tensor, tangents: Sequence[Tensor], block: Block, memory: Tensor
) -> Tensor:
    """Compute the block of S'."""
    scale = blocks.a.scale
    moved = blocks.product(tangents[0], key, block, memory, scale)
    return moved.baddbmm_(block.of_rows(query), block.of_keys(tangents[1]).mT, alpha=scale)


def jvp(a: Attention, logsumexp: Tensor, tangents: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute O' + m O, in the dtype of sums, and m."""
    blocks = Blocks(a)
    query, key, value, *wide_tangents = blocks.wide(*a[:3], *tangents)
    moved_output, mean = query.new_zeros((*query.shape[:2], value.shape[2])), blocks.zeros(logsumexp)
    memory = blocks.memory(), blocks.memory()
    for block in blocks:
        p = blocks.probabilities(query, key, logsumexp, block, memory[0])
        moved = _moved(blocks, query, key, wide_tangents, block, memory[1]).mul_(p)
        mean[block[:2]] = moved.sum(-1)
        out = torch.bmm(moved, block.of_keys(value))
        moved_output[block[:2]] = out.baddbmm_(p, block.of_keys(wide_tangents[2]))
    return moved_output, mean


def double_backward(
    a: Attention,
    logsumexp: Tensor,
    cotangent: Tensor,
    along: Tensor,
    tangents: tuple[Tensor, Tensor, Tensor],
    known: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the derivatives of <G, O'> by G, which is O', query, key and value.

    along: D; known: m and f, if O' is known, which is then left empty.
    """
    blocks = Blocks(a)
    query, key, value, given, tq, tk, tv = blocks.wide(*a[:3], cotangent, *tangents)
    tangent = blocks.zeros(cotangent if known is None else cotangent[:0])
    to_query, to_key, to_value = (blocks.zeros(x) for x in a[:3])
    memory = [blocks.memory() for _ in range(4)]
    for block in blocks:
        g, of_keys = block.of_rows(given), block.of_keys
        p = blocks.probabilities(query, key, logsumexp, block, memory[0])
        ts = _moved(blocks, query, key, (tq, tk), block, memory[1])
        tp = memory[2][: p.numel()].view_as(p)
        m = (torch.mul(p, ts, out=tp).sum(-1) if known is None else block.of_rows(known[0]))[..., None]
        torch.mul(p, ts.sub_(m), out=tp)
        of_keys(to_value).baddbmm_(tp.mT, g)
        if known is None:
            out = torch.bmm(tp, of_keys(value)).baddbmm_(p, of_keys(tv))
            tangent[block[:2]], f = out, (g * out).sum(-1)
        else:
            f = block.of_rows(known[1])
        ds = blocks.product(given, value, block, memory[3]).sub_(block.of_rows(along)[..., None])
        b = blocks.product(given, tv, block, memory[2]).sub_(f[..., None]).addcmul_(ts, ds).mul_(p)
        ds.mul_(p)
        to_query[block[:2]] = torch.bmm(b, of_keys(key)).baddbmm_(ds, of_keys(tk))
        rows, t_rows = block.of_rows(query), block.of_rows(tq)
        of_keys(to_key).baddbmm_(b.mT, rows, alpha=a.scale).baddbmm_(ds.mT, t_rows, alpha=a.scale)
    found = to_query.mul_(a.scale).to(a.query.dtype), to_key.to(a.key.dtype), to_value.to(a.value.dtype)
    return tangent.to(cotangent.dtype), *found
