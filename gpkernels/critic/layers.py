"""Layers that do not send zeros through the network when a gradient is differentiated.

PyTorch's double backward of a threshold, a leaky ReLU, a hardtanh or a pooling gives exact zeros for the layer's input,
and so the whole forward graph is run backwards once more on zeros. These give nothing instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gpkernels.critic.graph import LEAF, rule_of
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Meta, Rule, Saved, Unfit
from gpkernels.critic.rules.piecewise import Hardtanh, LeakyReLUInPlace, ReLU


class _Forward(Function):
    """A layer that is linear but for what it saves: its rule goes back, forth, back and so on, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
        with torch.enable_grad():
            y = function(x.detach().requires_grad_())
        node = y.grad_fn
        if node is None or node.name() not in RULES or any(p.name() != LEAF for p, _ in node.next_functions if p):
            raise Unfit("it is not one node with a rule")
        ctx.rule, saved = rule_of(node)
        ctx.save_for_backward(*saved)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Pull.apply(cotangent, ctx.rule, *ctx.saved_tensors), None


class _InPlace(Function):
    """The same for a layer that overwrites its input, and whose rule reads the output alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], rule: type[Rule], constants: Any) -> Any:
        y = function(x)
        ctx.mark_dirty(x)
        meta = Meta(tuple(x.shape), x.dtype, x.device)
        ctx.rule = rule(constants, (meta,), (meta,))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Pull.apply(cotangent, ctx.rule, *ctx.saved_tensors), None, None, None


class _Pull(Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, rule: Rule, *saved: Tensor) -> Any:
        ctx.rule = rule
        ctx.save_for_backward(*saved)
        return rule.pull(Saved(saved), (cotangent,), (True,))[0]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        return (_Push.apply(tangent, ctx.rule, *ctx.saved_tensors), *_nothing(ctx))


class _Push(Function):
    @staticmethod
    def forward(ctx: Any, tangent: Tensor, rule: Rule, *saved: Tensor) -> Any:
        ctx.rule = rule
        ctx.save_for_backward(*saved)
        return rule.push(Saved(saved), (tangent,))[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return (_Pull.apply(cotangent, ctx.rule, *ctx.saved_tensors), *_nothing(ctx))


def _nothing(ctx: Any) -> Sequence[None]:
    """For the rule and the saved tensors: the layer is constant in them almost everywhere."""
    return (None,) * (1 + len(ctx.saved_tensors))


def _called(x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
    try:
        return _Forward.apply(x, function)
    except Unfit:  # an image of channels-last order that is pooled to one pixel, say
        return function(x)


def _layer(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("return_indices"):
            return function(x, *args, **kwargs)
        return _called(x, lambda x: function(x, *args, **kwargs))

    return call


def _unwritable(x: Tensor) -> bool:
    """What a call in place is left to PyTorch for: its error comes before the write."""
    return x.is_leaf or x._base is not None


def _relu(x: Tensor, inplace: bool = False) -> Any:
    if not inplace:
        return _called(x, torch.relu)
    return F.relu(x, True) if _unwritable(x) else _InPlace.apply(x, torch.relu_, ReLU, ())


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not inplace:
        return _called(x, lambda x: F.leaky_relu(x, negative_slope))
    if _unwritable(x) or negative_slope <= 0:  # the output does not tell the sign of the input
        return F.leaky_relu(x, negative_slope, True)
    return _InPlace.apply(x, lambda x: F.leaky_relu_(x, negative_slope), LeakyReLUInPlace, (negative_slope,))


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    if not inplace:
        return _called(x, lambda x: F.hardtanh(x, min_val, max_val))
    if _unwritable(x):
        return F.hardtanh(x, min_val, max_val, True)
    return _InPlace.apply(x, lambda x: F.hardtanh_(x, min_val, max_val), Hardtanh, (min_val, max_val))


def _relu6(x: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(x, 0.0, 6.0, inplace)


LAYERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, torch.Tensor.relu_), lambda x: _relu(x, True)),
    F.leaky_relu: _leaky_relu,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    **{f: _layer(f) for f in (F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)},
    **{f: _layer(f) for f in (F.avg_pool2d, F.adaptive_avg_pool2d)},
}
NUMBERS = {function: number for number, function in enumerate(LAYERS)}  # which a compiler's graph can hold
