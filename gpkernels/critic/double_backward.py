"""Piecewise-linear layers whose double backward skips exact zeros: a drop-in for hand-written penalties.

PyTorch's double backward of a threshold, a leaky ReLU, a hardtanh or a pooling returns exact zeros for the layer's
input, so the whole forward graph is differentiated once more on zeros. Inside ``fast_double_backward()`` these layers
return no gradient instead. Everything else is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling, is_exporting
from torch.overrides import TorchFunctionMode

from gpkernels.critic.graph import LEAF, rule_of
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Meta, Rule, Saved, Unfit
from gpkernels.critic.rules.piecewise import Hardtanh, LeakyReLUInPlace, ReLU
from gpkernels.private import dual_level, function_mode_count, function_modes, transforms_active


class _Forward(Function):
    """A layer that is linear given its saved tensors: its rule alternates VJP and JVP, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
        with torch.enable_grad():
            y = function(x.detach().requires_grad_())
        node = y.grad_fn
        if node is None or node.name() not in RULES or any(p.name() != LEAF for p, _ in node.next_functions if p):
            raise Unfit("expected one node with a rule")
        ctx.rule, saved = rule_of(node)
        ctx.save_for_backward(*saved)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Pull.apply(cotangent, ctx.rule, *ctx.saved_tensors), None


class _InPlace(Function):
    """The same for a layer that overwrites its input and whose rule reads the output alone."""

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
    """Return no gradient for the rule and the saved tensors, in which the layer is constant almost everywhere."""
    return (None,) * (1 + len(ctx.saved_tensors))


def _called(x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
    try:
        return _Forward.apply(x, function)
    except Unfit:  # such as a channels-last image pooled to one pixel
        return function(x)


def _layer(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("return_indices"):
            return function(x, *args, **kwargs)
        return _called(x, lambda x: function(x, *args, **kwargs))

    return call


def _unwritable(x: Tensor) -> bool:
    """Whether PyTorch rejects a write to ``x``; its own function then raises before the write."""
    return x.is_leaf or x._base is not None


def _relu(x: Tensor, inplace: bool = False) -> Any:
    if not inplace:
        return _called(x, torch.relu)
    return F.relu(x, True) if _unwritable(x) else _InPlace.apply(x, torch.relu_, ReLU, ())


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not inplace:
        return _called(x, lambda x: F.leaky_relu(x, negative_slope))
    if _unwritable(x) or negative_slope <= 0:  # the sign of the input cannot be read from the output
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


class fast_double_backward(TorchFunctionMode):
    """Context manager in which piecewise-linear layers have a double backward that skips zero gradients.

    PyTorch's double backward of a ReLU or a pooling returns exact zeros for the layer's input, so that the whole
    forward graph is differentiated once more on zeros. Layers called inside this context return no gradient instead.
    Values and gradients are PyTorch's, for derivatives of any order; where PyTorch's gradient is zero because nothing
    depends on a weight, it may be None.

    Layers: ReLU, LeakyReLU, Hardtanh and ReLU6, also in place; max, average and adaptive pooling of images. Every other
    operation is unchanged, and so is everything inside ``torch.compile`` and transforms of ``torch.func``. Penalties of
    this library that are called inside are differentiable to any order.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> x = torch.randn(8, 2, requires_grad=True)
        >>> with gpkernels.fast_double_backward():
        ...     (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        >>> gpkernels.gradient_norm_penalty(grad).backward()
    """

    # Enter and exit are inherited: torch.compile does not support a graph break inside a mode that overrides them.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_compiling() or _composes_alone():  # these have derivatives of their own
            return func(*args, **kwargs)
        layer = LAYERS.get(func)
        if layer is not None and torch.is_grad_enabled() and args and args[0].requires_grad:
            return layer(*args, **kwargs)
        return func(*args, **kwargs)


def _composes_alone() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work."""
    return transforms_active() or dual_level() >= 0


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, which differentiates by itself.

    Raises RuntimeError in ``torch.export``, whose programs hold calls that autograd has not seen.
    """
    if is_exporting():
        raise RuntimeError("torch.export cannot hold a gradient of the critic; export the critic, or use torch.compile")
    return transforms_active()


def depth() -> int:
    """Count the active ``fast_double_backward()`` contexts of this thread."""
    if not function_mode_count():
        return 0
    return sum(isinstance(mode, fast_double_backward) for mode in function_modes())
