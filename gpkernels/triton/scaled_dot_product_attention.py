"""Launchers of attention's kernels, which are in ``attention_tiles.py``; what these do not do goes by blocks."""

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
from gpkernels.triton.attention_tiles import (
    attention_bend_to_keys_kernel,
    attention_bend_to_rows_kernel,
    attention_jvp_kernel,
    attention_kernel,
    attention_to_keys_kernel,
    attention_to_rows_kernel,
)
from gpkernels.triton.common import check_floating, check_same, interpreted, launch

# The widest heads, beyond which tiles do not fit in registers; these go by blocks of PyTorch's products instead.
WIDEST = 256
_NO_MASK, _BOOL, _ADDED = 0, 1, 2


class Sizes(NamedTuple):
    """How a call is launched. last: the arguments that all kernels end with; warps: over rows and over keys."""

    matrices: int
    rows: int
    keys: int
    device: torch.device
    last: tuple[Any, ...]
    constants: dict[str, Any]
    warps: tuple[int, int]

    def over_rows(self, kernel: Any, *tensors: Tensor) -> None:
        programs = self.matrices * triton.cdiv(self.rows, self.constants["ROWS"])
        launch(kernel, programs, self.device, *tensors, *self.last, **self.constants, num_warps=self.warps[0])

    def over_keys(self, kernel: Any, *tensors: Tensor) -> None:
        programs = self.matrices * triton.cdiv(self.keys, self.constants["COLS"])
        launch(kernel, programs, self.device, *tensors, *self.last, **self.constants, num_warps=self.warps[1])


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


def _tiles(dtype: torch.dtype, width: int, values: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Return sizes of tiles, and warps over rows and over keys: the fastest of those in bench/attention_tiles.py."""
    widest = triton.next_power_of_2(max(width, values))
    chunk, least, warps = max(16, widest), 16, (4, 4)
    if dtype == torch.float32 and widest > 128:
        # Scores are sums over chunks of the width. Triton spreads warps over the longer side of a product, or over its
        # rows, which are too few; here the other side, COLS or a padded width, is always longer.
        rows, cols, chunk, least, warps = 16, 32, 32, 64, (4, 8)
    elif dtype == torch.float32:
        rows = cols = 32 if widest <= 64 else 16
    elif widest > 128:
        rows, cols, warps = 16, 16, (8, 8)
    else:
        rows, cols = 64, 64 if widest <= 64 else 32
    padded, values_padded = (max(least, triton.next_power_of_2(w)) for w in (width, values))
    return {"PADDED": padded, "VALUES_PADDED": values_padded, "ROWS": rows, "COLS": cols, "CHUNK": chunk}, warps


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
    # The interpreter has no products of bfloat16.
    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    kind_of_products = tl.float32 if interpreted() else kinds.get(query.dtype, tl.float32)
    tiles, warps = _tiles(query.dtype, width, values)
    constants = {
        "WIDTH": width, "VALUES": values, "MASK": kind, "CAUSAL": is_causal, "TYPE": kind_of_products,
        "PRECISION": _precision(), **tiles, "num_stages": 1,
    }  # fmt: skip
    last = (query if mask is None else mask, *strides, heads, length, keys, scale)
    return Sizes(batch * heads, length, keys, query.device, last, constants, warps)


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """Make the tensors dense as (B, T, H, D)."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def _is_for_blocks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call is left to the blocks: float64, wider heads, nothing to do, a GPU that Triton does not support."""
    width = max(query.shape[3], value.shape[3])
    nothing = not (query.numel() and key.numel() and value.numel())
    return query.dtype == torch.float64 or width > WIDEST or nothing or not _is_supported(query.device)


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
