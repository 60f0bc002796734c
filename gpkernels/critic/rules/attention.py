"""Attention by PyTorch's fused kernels, which have no second derivative; ours keeps a number per row, too."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.rules.base import (
    Layout,
    Layouts,
    Mixed,
    Rows,
    RowsRead,
    Rule,
    Saved,
    Shapes,
    Tensors,
    Unfit,
    Wanted,
)
from gpkernels.ops.scaled_dot_product_attention import (
    scaled_dot_product_attention_backward_op,
    scaled_dot_product_attention_double_backward_op,
    scaled_dot_product_attention_jvp_op,
    scaled_dot_product_attention_op,
)

# Straight to the dispatcher: a compiler is to see one call and not the blocks, whatever backend is forced.
_forward, _pull, _push, _bend = (
    op.overload
    for op in (
        scaled_dot_product_attention_op,
        scaled_dot_product_attention_backward_op,
        scaled_dot_product_attention_jvp_op,
        scaled_dot_product_attention_double_backward_op,
    )
)

aten = torch.ops.aten


class Attention(Rule):
    """softmax(scale q k^T + mask) v; a group of query heads may share a head of keys and values."""

    names = ("ScaledDotProductFlashAttentionForCpuBackward0",)
    saved = ("query", "key", "value", "attn_mask", "output", "logsumexp")
    constants = ("dropout_p", "is_causal", "scale")
    sends = True

    def set_up(self, dropout_p: float, is_causal: bool, scale: float | None) -> None:
        if dropout_p:
            raise Unfit("dropout within a fused kernel")
        self.is_causal, self.scale = is_causal, scale

    def curved(self, moving: Sequence[bool]) -> bool:
        return True

    def flops(self, shapes: Shapes) -> int:
        query, key = shapes[:2]
        return 0 if query is None or key is None else 2 * prod(query[:3]) * key[2] * (query[3] + self._width)

    @property
    def _width(self) -> int:
        return self.outputs[0].shape[3]

    def _rows(self, s: Saved, query: Tensor, key: Tensor, value: Tensor, constants: Any) -> tuple[Any, ...]:
        """Return the output and its rows' logsumexp."""
        return s[4], s[5]

    def _call(self, s: Saved) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Return query, key, value, output, logsumexp, and the ops' constants."""
        if "call" not in s.notes:
            query, mask = s[0], s[3] if s[3:] else None
            key, value = (self._spread(x) for x in s[1:3])
            scale = 1 / sqrt(query.shape[3]) if self.scale is None else self.scale
            constants = mask, self.is_causal, scale
            s.notes["call"] = (query, key, value, *self._rows(s, query, key, value, constants)), constants
        return s.notes["call"]

    def _spread(self, x: Tensor) -> Tensor:
        """Repeat heads of keys or values for each query head."""
        groups = self.outputs[0].shape[1] // x.shape[1]
        return x if groups == 1 else x.repeat_interleave(groups, 1)

    def _gathered(self, s: Saved, found: Sequence[Tensor], wanted: Wanted) -> list[Tensor | None]:
        """Sum cotangents over the query heads that share a head."""
        own = [
            g if g.shape[1] == x.shape[1] else g.unflatten(1, (x.shape[1], -1)).sum(2)
            for g, x in zip(found, s, strict=False)
        ]
        kept: list[Tensor | None] = [g if w else None for g, w in zip(own, wanted, strict=False)]
        return kept + [None] * (len(self.inputs) - 3)

    def pull(self, s: Saved, c: Tensors, wanted: Wanted) -> Tensors:
        if c[0] is None:
            return [None] * len(self.inputs)
        kept, constants = self._call(s)
        return self._gathered(s, self._pulled(c[0], kept, constants), wanted)

    def _pulled(self, cotangent: Tensor, kept: Sequence[Tensor], constants: Any) -> Sequence[Tensor]:
        """Return the cotangents of query, key and value, by the kernel of the node."""
        mask, is_causal, scale = constants
        dense = cotangent if cotangent.stride(-1) == 1 else cotangent.contiguous()
        found: Sequence[Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dense, *kept, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return found

    def _for_products(self, x: Tensor) -> Tensor:
        """Copy matrices once for both ops of the second order, which take one after another."""
        return x.contiguous()

    def _moved(self, s: Saved, t: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """Return the operands, tangents first, and the output's tangent with the rows' mean of the scores'."""
        known = s.notes.get("moved")
        if known is not None and all(u is v for u, v in zip(known[0], t, strict=True)):
            return known[1]
        (*tensors, output, logsumexp), constants = self._call(s)
        tangents = [torch.zeros_like(x) if u is None else self._spread(u) for u, x in zip(t[:3], tensors, strict=True)]
        moving = *map(self._for_products, tangents), *map(self._for_products, tensors), output, logsumexp
        moved = moving, _push(*moving, *constants)
        s.notes["moved"] = tuple(t), moved
        return moved

    def push(self, s: Saved, t: Tensors) -> Tensors:
        return self._moved(s, t)[1][0], *[None] * (len(self.outputs) - 1)

    def bend(self, s: Saved, t: Tensors, c: Tensors, wanted: Wanted) -> Tensors:
        if c[0] is None or all(u is None for u in t[:3]):
            return [None] * len(self.inputs)
        moving, known = self._moved(s, t)
        s.notes.pop("moved")
        constants = self._call(s)[1]
        return self._gathered(s, _bend(*moving[:3], c[0], *moving[3:], *known, *constants)[1:], wanted)

    def layout(self, layouts: Layouts) -> Layout | None:
        query, key, value = layouts[:3]
        if query is None or query.axis != 0 or key != query or value != query:
            raise Mixed
        return query

    def saved_layouts(self, layouts: Layouts, out: Layout | None, shapes: Shapes) -> Layouts:
        mask = shapes[3] if shapes[3:] else None
        per_sample = mask is not None and len(mask) == 4 and mask[0] == self.outputs[0].shape[0] != 1
        return [out, out, out, out if per_sample else None, *[out] * (len(shapes) - 4)][: len(shapes)]

    def of_row(self, row: Rows, shapes: Shapes) -> RowsRead:
        """One query needs all keys and values, unless it sees those before it alone."""
        output, query = self.outputs[0].shape, self.inputs[0]
        at = row.axis_of(output)
        if query is None or at != (2, 1, 1) or self.is_causal:
            raise Mixed
        of_query = row._replace(inner=query.shape[3])
        of_statistics = row._replace(inner=1)
        mask = shapes[3] if shapes[3:] else None
        of_mask = None
        if mask is not None and len(mask) > 1 and mask[-2] > 1:
            of_mask = Rows.along(mask, len(mask) - 2, row.index)
        saved = (of_query, None, None, of_mask, row, of_statistics)
        return [of_query, *[None] * (len(self.inputs) - 1)], saved[: len(shapes)]


class OnGPU(Attention):
    """Kernels for GPUs, whose statistics of rows differ in layout and meaning: they are computed again."""

    names = ("ScaledDotProductEfficientAttentionBackward0", "ScaledDotProductCudnnAttentionBackward0")
    saved = ("query", "key", "value", "attn_bias")

    def _rows(self, s: Saved, query: Tensor, key: Tensor, value: Tensor, constants: Any) -> tuple[Any, ...]:
        return _forward(query, key, value, *constants)

    def _for_products(self, x: Tensor) -> Tensor:
        return x

    def _pulled(self, cotangent: Tensor, kept: Sequence[Tensor], constants: Any) -> Sequence[Tensor]:
        return _pull(cotangent, *kept, *constants)


class FlashOnGPU(OnGPU):
    """The same, without a mask."""

    names = ("ScaledDotProductFlashAttentionBackward0",)
    saved = ("query", "key", "value")


RULES: tuple[type[Rule], ...] = (Attention, OnGPU, FlashOnGPU)
