"""scaled_dot_product_attention: softmax(scale q k^T + mask) v, with first and second derivative in linear memory.

PyTorch's fused kernels compute the value and the first derivative without the (T, S) matrix of scores, but have no
second derivative. Here the rows' logsumexp is kept, from which blocks of scores are computed again; the formulas are in
``attention_blocks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpkernels.ops import attention_blocks as blocks
from gpkernels.ops.attention_blocks import Attention
from gpkernels.ops.checks import check_finite, check_flag, check_floating, check_same_device
from gpkernels.ops.differentiable import Differentiable, apply, second_order
from gpkernels.ops.op import LIBRARY, Op
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.private import dual_level, transforms_active

aten = torch.ops.aten

# Of all heads of a call; a GPU launches more kernels for the plain form, in less time than to compute scores again.
MOST_SCORES_KEPT, MOST_KEPT_ON_GPU, MOST_KEPT_OF_16_BITS_ON_GPU = 1 << 20, 1 << 24, 1 << 22


def scaled_dot_product_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Compute softmax(scale q k^T + mask) v, with all scores at once (Vaswani et al. 2017, eq. 1).

    A bool mask is True where a key takes part. A row without any has the value 0 and no gradient.
    """
    wide = accumulation_dtype(query.dtype)
    scores = (query.to(wide) * scale) @ key.to(wide).mT
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(seen.logical_not(), -torch.inf)
    if attn_mask is None:
        weights = torch.softmax(scores, -1)
    else:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf) if hidden else scores + attn_mask
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, True)
    return (weights @ value.to(wide)).to(query.dtype)


# --- raw ops, on (B, H, T, D), (B, H, S, D) and (B, H, S, Dv) ---------------------------------------------------------


def _matrices(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Attention:
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    heads = query.shape[1]
    return Attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask, heads, is_causal, scale)


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """Give matrices the shape of (B, H, T, D), in memory as (B, T, H, D), as PyTorch's kernels do."""
    return x.view(*like.shape[:3], x.shape[-1]).transpose(1, 2).contiguous().transpose(1, 2)


def _rows_sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum products along the last axis, in the dtype of sums."""
    wide = accumulation_dtype(a.dtype)
    return (a.to(wide) * b.to(wide)).sum(-1)


def new_tokens_first(like: Tensor, width: int) -> Tensor:
    """Return memory of shape (B, H, T, width), in the order of (B, T, H, width)."""
    batch, heads, length, _ = like.shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _is_fused(query: Tensor, value: Tensor, key: Tensor) -> bool:
    """Whether PyTorch's kernel for CPUs computes value and first derivative."""
    alike = query.shape[3] == value.shape[3]
    return query.device.type == "cpu" and alike and query.numel() > 0 and key.numel() > 0


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return the mask as numbers that are added to the scores, as PyTorch's kernel wants it."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(query.dtype)
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(mask.logical_not(), -torch.inf)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if _is_fused(query, value, key):
        output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            _dense(query), _dense(key), _dense(value), 0.0, is_causal, attn_mask=_added(attn_mask, query), scale=scale
        )
        if logsumexp.all():  # 0 for a row that sees no key, but also for one of NaN, whose output would be 0, too
            return output.transpose(1, 2).contiguous().transpose(1, 2), logsumexp.contiguous()
    output, logsumexp = blocks.attention(_matrices(query, key, value, attn_mask, is_causal, scale))
    return _tokens_first(output, query), logsumexp.view(query.shape[:3])


def _attention_backward(
    cotangent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    if _is_fused(query, value, key):
        tensors = [_dense(x) for x in (cotangent, query, key, value, output)]
        mask = _added(attn_mask, query)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, logsumexp, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return tuple(found)
    a = _matrices(query, key, value, attn_mask, is_causal, scale)
    along = _rows_sum(cotangent, output).flatten(0, 1)
    found = blocks.vjp(a, logsumexp.flatten(0, 1), cotangent.flatten(0, 1), along)
    return tuple(_tokens_first(g, x) for g, x in zip(found, (query, key, value), strict=True))


def _attention_jvp(
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
    a = _matrices(query, key, value, attn_mask, is_causal, scale)
    tangents = query_tangent.flatten(0, 1), key_tangent.flatten(0, 1), value_tangent.flatten(0, 1)
    moved, mean = blocks.jvp(a, logsumexp.flatten(0, 1), tangents)
    mean = mean.view(query.shape[:3])
    tangent = _tokens_first(moved, output).addcmul_(output.to(moved.dtype), mean[..., None], value=-1)
    return tangent.to(output.dtype), mean


def _attention_double_backward(
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
) -> tuple[Tensor, ...]:
    a = _matrices(query, key, value, attn_mask, is_causal, scale)
    tangents = query_tangent.flatten(0, 1), key_tangent.flatten(0, 1), value_tangent.flatten(0, 1)
    known = None
    if tangent is not None and mean is not None:
        known = mean.flatten(0, 1), _rows_sum(cotangent, tangent).flatten(0, 1)
    rows = logsumexp.flatten(0, 1), cotangent.flatten(0, 1), _rows_sum(cotangent, output).flatten(0, 1)
    to_cotangent, *found = blocks.double_backward(a, *rows, tangents, known)
    given = _tokens_first(to_cotangent, output) if known is None else output.new_empty(0)
    return given, *(_tokens_first(g, x) for g, x in zip(found, (query, key, value), strict=True))


def new_statistics(query: Tensor) -> Tensor:
    """Return memory for a number per row."""
    return query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


_TENSORS = "Tensor query, Tensor key, Tensor value"
_KEPT = f"{_TENSORS}, Tensor output, Tensor logsumexp"
_TANGENTS = "Tensor query_tangent, Tensor key_tangent, Tensor value_tangent"
_CONSTANTS = "Tensor? attn_mask, bool is_causal, float scale"

scaled_dot_product_attention_op = Op(
    f"scaled_dot_product_attention({_TENSORS}, {_CONSTANTS}) -> (Tensor, Tensor)",
    _attention,
    lambda query, key, value, *_: (new_tokens_first(query, value.shape[3]), new_statistics(query)),
)

scaled_dot_product_attention_backward_op = Op(
    f"scaled_dot_product_attention_backward(Tensor cotangent, {_KEPT}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    lambda cotangent, query, key, value, *_: tuple(new_tokens_first(x, x.shape[3]) for x in (query, key, value)),
)

scaled_dot_product_attention_jvp_op = Op(
    f"scaled_dot_product_attention_jvp({_TANGENTS}, {_KEPT}, {_CONSTANTS}) -> (Tensor, Tensor)",
    _attention_jvp,
    lambda tq, tk, tv, query, key, value, *_: (new_tokens_first(query, value.shape[3]), new_statistics(query)),
)

scaled_dot_product_attention_double_backward_op = Op(
    f"scaled_dot_product_attention_double_backward({_TANGENTS}, Tensor cotangent, {_KEPT}, Tensor? tangent,"
    f" Tensor? mean, {_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_double_backward,
    lambda tq, tk, tv, cotangent, query, key, value, output, logsumexp, tangent, *_: (
        new_tokens_first(output, output.shape[3]) if tangent is None else output.new_empty(0),
        *(new_tokens_first(x, x.shape[3]) for x in (query, key, value)),
    ),
)


def register_flops() -> None:
    """Tell PyTorch's counters of FLOPs about the ops, and about PyTorch's own kernel for CPUs."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula  # deferred, as it imports Triton

    ours = torch.ops.gpkernels.scaled_dot_product_attention
    if ours in flop_registry:
        return

    def register(op: Any, first: int, by_keys: int, by_values: int) -> None:
        """The op makes some products over the width of keys, and over that of values; first: where query is."""

        def flops(*shapes: Any, **_: Any) -> int:
            query, key, value = shapes[first : first + 3]
            more = 2 if first == 4 and shapes[9] is None else 0  # the tangent of the output is not known
            inner = by_keys * query[3] + (by_values + more) * value[3]
            return 2 * math.prod(query[:3]) * int(key[2]) * int(inner)

        register_flop_formula(op)(flops)

    register(ours, 0, 1, 1)
    register(torch.ops.gpkernels.scaled_dot_product_attention_backward, 1, 3, 2)
    register(torch.ops.gpkernels.scaled_dot_product_attention_jvp, 3, 3, 2)
    register(torch.ops.gpkernels.scaled_dot_product_attention_double_backward, 4, 7, 3)
    register(aten._scaled_dot_product_flash_attention_for_cpu, 0, 1, 1)
    register(aten._scaled_dot_product_flash_attention_for_cpu_backward, 1, 3, 2)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _composes_alone() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is at work, for which the reference is differentiated."""
    return transforms_active() or dual_level() >= 0


def _is_small(query: Tensor, key: Tensor, batch: Sequence[int]) -> bool:
    """Whether a derivative of the reference, which keeps its scores, takes less time than to compute them again."""
    most = MOST_SCORES_KEPT
    if query.device.type != "cpu":
        most = MOST_KEPT_OF_16_BITS_ON_GPU if query.element_size() == 2 else MOST_KEPT_ON_GPU
    return math.prod(batch) * query.shape[-2] * key.shape[-2] <= most


class _Attention(Differentiable):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Any:
        return scaled_dot_product_attention_op(query, key, value, mask, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        query, key, value, mask, *ctx.constants = inputs
        ctx.save_for_backward(query, key, value, *output, mask)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, _: None) -> Any:
        if cotangent is None:  # of a second derivative, which has all that depends on the output
            return (None,) * 6
        *kept, mask = ctx.saved_tensors
        if _composes_alone():
            pulled = torch.func.vjp(_of_tensors(mask, *ctx.constants), *kept[:3])[1](cotangent)
        else:
            pulled = apply(_AttentionBackward, cotangent, *kept, mask, *ctx.constants)
        return *pulled, None, None, None


class _AttentionBackward(Differentiable):
    @staticmethod
    def forward(
        cotangent: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Any:
        return scaled_dot_product_attention_backward_op(
            cotangent, query, key, value, output, logsumexp, mask, is_causal, scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        cotangent, query, key, value, output, logsumexp, mask = ctx.saved_tensors
        constants = mask, ctx.is_causal, ctx.scale
        if _composes_alone():
            found = second_order(_of_tensors(*constants), (query, key, value), cotangent, tangents)
        else:
            found = apply(
                *(_AttentionDoubleBackward, *tangents, cotangent, query, key, value, output, logsumexp), *constants
            )
        return *found, *[None] * 5


class _AttentionDoubleBackward(Differentiable):
    @staticmethod
    def forward(
        query_tangent: Tensor,
        key_tangent: Tensor,
        value_tangent: Tensor,
        cotangent: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Any:
        tensors = query_tangent, key_tangent, value_tangent, cotangent, query, key, value, output, logsumexp
        return scaled_dot_product_attention_double_backward_op(*tensors, None, None, mask, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "scaled_dot_product_attention has no third derivative; use torch.nn.functional's under "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), which has every order"
        )


def _of_tensors(mask: Tensor | None, is_causal: bool, scale: float) -> Any:
    return lambda query, key, value: scaled_dot_product_attention_reference(
        query, key, value, mask, 0.0, is_causal, scale
    )


# A compiler's graph of ``_Attention.backward`` has the raw op, which penalties of a compiled critic differentiate.
for _op, _function in (
    (scaled_dot_product_attention_backward_op, _AttentionBackward),
    (scaled_dot_product_attention_double_backward_op, _AttentionDoubleBackward),
):
    torch.library.register_autograd(
        f"gpkernels::{_op.name}", _function.backward, setup_context=_function.setup_context, lib=LIBRARY
    )


# --- public -----------------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Compute :func:`torch.nn.functional.scaled_dot_product_attention`, with a second derivative in linear memory.

    .. math::
        \text{softmax}(\text{scale} \; Q K^\top + \text{mask}) \, V

    None of PyTorch's fused kernels can be differentiated twice, and its plain form keeps several
    :math:`(T, S)` matrices for each head. Here value, first and second derivative keep a number per row, and compute
    scores by blocks. Four cases take the plain form, which keeps the matrices and has derivatives of any order:
    dropout, a mask that requires a gradient, transforms of ``torch.func`` and forward mode, and few scores in all heads
    together, which take less time to keep than to compute again: :math:`2^{20}` on CPUs, :math:`2^{24}` on GPUs, of
    types of 16 bits :math:`2^{22}`. Otherwise a third derivative raises RuntimeError.

    Args:
        query (Tensor): queries.
        key (Tensor): keys.
        value (Tensor): values.
        attn_mask (Tensor, optional): mask that broadcasts to the scores: bool, True where a key takes part, or
            floating-point, added to the scores. A row that sees no key has the value 0.
        dropout_p (float): probability of dropping a weight, also in evaluation mode. Default: 0.
        is_causal (bool): whether query :math:`i` sees keys :math:`j \le i` only; without ``attn_mask``. Default: False.
        scale (float, optional): factor of the products. Default: :math:`1 / \sqrt{E}`.
        enable_gqa (bool): whether groups of query heads share a head of key and value. Default: False.

    Shape:
        - query: :math:`(*, T, E)`, with ``enable_gqa`` :math:`(*, H_q, T, E)`
        - key: :math:`(*, S, E)`, or :math:`(*, H, S, E)`
        - value: :math:`(*, S, E_v)`, or :math:`(*, H, S, E_v)`
        - attn_mask: broadcasts to :math:`(*, T, S)`
        - Output: :math:`(*, T, E_v)`

    Returns:
        Tensor: the attention, in the dtype of the arguments; under autocast in autocast's.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, the mask neither that nor bool, or a constant not a
            number or flag.
        ValueError: shapes, dtypes or devices do not fit, ``attn_mask`` and ``is_causal`` are both given, or
            ``dropout_p`` is no probability.

    Example:
        >>> x = torch.randn(2, 4, 128, 16, requires_grad=True)
        >>> score = gpkernels.scaled_dot_product_attention(x, x, x).square().sum()
        >>> (grad,) = torch.autograd.grad(score, x, create_graph=True)
        >>> grad.square().sum().backward()

    References:
        Vaswani et al., "Attention Is All You Need", 2017, eq. 1. https://arxiv.org/abs/1706.03762

        Dao et al., "FlashAttention", 2022, for the recomputation. https://arxiv.org/abs/2205.14135
    """
    _check(query, key, value, attn_mask)
    dropout_p = check_finite("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability, got {dropout_p}")
    is_causal = check_flag("is_causal", is_causal)
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: expected None with is_causal=True, got a mask")
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else check_finite("scale", scale)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if check_flag("enable_gqa", enable_gqa):
        key, value = (_spread(name, x, query) for name, x in (("key", key), ("value", value)))
    batch = _batch(query, key, value, attn_mask)
    graph = torch.is_grad_enabled()
    learned = graph and attn_mask is not None and attn_mask.requires_grad
    small = graph and any(x.requires_grad for x in (query, key, value)) and _is_small(query, key, batch)
    if dropout_p > 0 or learned or small or _composes_alone():
        return scaled_dot_product_attention_reference(query, key, value, attn_mask, dropout_p, is_causal, scale)
    tensors = [_four_axes(x, batch) for x in (query, key, value)]
    if attn_mask is not None:
        attn_mask = _mask_of_four_axes(attn_mask, batch)
    output: Tensor = apply(_Attention, *tensors, attn_mask, is_causal, scale)[0]
    return output if len(batch) == 2 else output.reshape(*batch, *output.shape[2:])


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(name, x)
        check_same_device("query", query, name, x)
        if x.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 axes, got shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: expected the last axis of query, {query.shape[-1]}, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: expected as many rows as key, {key.shape[-2]}, got {value.shape[-2]}")
    if mask is None:
        return
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        check_floating("attn_mask", mask)
        if mask.dtype not in (query.dtype, torch.float32):
            raise ValueError(f"attn_mask: expected bool or the dtype of query, {query.dtype}, got {mask.dtype}")
    check_same_device("query", query, "attn_mask", mask)


def _autocast(*tensors: Any) -> Any:
    """Cast as autocast does, for PyTorch's own attention."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype, plain = torch.get_autocast_dtype(device), (torch.bool, torch.float64)
    return [x if x is None or x.dtype in plain else x.to(dtype) for x in tensors]


def _spread(name: str, x: Tensor, query: Tensor) -> Tensor:
    """Repeat each head for the group of query heads that share it."""
    if x.dim() < 3 or query.dim() < 3 or not x.shape[-3] or query.shape[-3] % x.shape[-3]:
        raise ValueError(
            f"{name}: expected heads whose number divides that of query with enable_gqa, "
            f"got shapes {tuple(x.shape)} and {tuple(query.shape)}"
        )
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def _batch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> torch.Size:
    shapes = [x.shape[:-2] for x in (query, key, value)]
    try:
        batch = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"key, value: expected leading axes that broadcast with query's, {tuple(shapes[0])}, "
            f"got {tuple(shapes[1])} and {tuple(shapes[2])}"
        ) from None
    if mask is not None:
        scores = (*batch, query.shape[-2], key.shape[-2])
        own = tuple(mask.shape)
        if len(own) > len(scores) or any(m not in (1, n) for m, n in zip(own[::-1], scores[::-1], strict=False)):
            raise ValueError(f"attn_mask: expected a shape that broadcasts to {scores}, got {own}")
    return batch


def _four_axes(x: Tensor, batch: torch.Size) -> Tensor:
    x = x if x.shape[:-2] == batch else x.expand(*batch, *x.shape[-2:])
    if len(batch) == 2:
        return x
    heads = batch[-1] if batch else 1
    return x.reshape(math.prod(batch[:-1]), heads, *x.shape[-2:])


def _mask_of_four_axes(mask: Tensor, batch: torch.Size) -> Tensor:
    mask = mask[(None,) * (len(batch) + 2 - mask.dim())]
    if len(batch) > 2:
        lead = batch[:-1] if any(n > 1 for n in mask.shape[: len(batch) - 1]) else (1,) * (len(batch) - 1)
        mask = mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    return mask[(None,) * (4 - mask.dim())]
