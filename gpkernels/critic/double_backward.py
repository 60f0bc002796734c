"""Layers that do not send zeros through the network when a gradient is differentiated: the drop-in way.

PyTorch's double backward of a threshold, a leaky ReLU, a hardtanh or a pooling gives exact zeros for the layer's input,
and so the whole forward graph is run backwards once more on zeros. Inside ``fast_double_backward()`` these layers give
nothing instead. Everything else is PyTorch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from gpkernels.critic.activation import Elementwise, piecewise
from gpkernels.critic.pooling import DIMS, gathered, pooled, scattered


class _Piecewise(Function):
    """A piecewise-linear activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], slope: Elementwise, from_output: bool
    ) -> Any:
        y = function(x)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y if from_output else x)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Slope.apply(cotangent, ctx.saved_tensors[0].detach(), ctx.slope), None, None, None


class _Slope(Function):
    """cotangent * f'(x): linear in the cotangent, and constant in x almost everywhere."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, saved: Tensor, slope: Elementwise) -> Any:
        ctx.save_for_backward(saved)
        ctx.slope = slope
        return slope(cotangent, saved)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        return _Slope.apply(tangent, ctx.saved_tensors[0], ctx.slope), None, None


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Any], args: Any, kwargs: Any, dims: int) -> Any:
        output, places = pooled(function, (x, *args), kwargs)
        ctx.save_for_backward(places)
        ctx.shape, ctx.dims = x.shape[1:], dims
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Scatter.apply(cotangent, ctx.saved_tensors[0], ctx.shape, ctx.dims), None, None, None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, places: Tensor, shape: Sequence[int], dims: int) -> Any:
        ctx.save_for_backward(places)
        ctx.dims = dims
        return scattered(cotangent, places, shape, dims)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        return gathered(tangent, ctx.saved_tensors[0], ctx.dims), None, None, None


class _Linear(Function):
    """A function that is linear in x, such as average pooling; its transpose is PyTorch's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
        ctx.shape, ctx.function = x.shape, function
        return function(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Transpose.apply(cotangent, ctx.shape, ctx.function), None


class _Transpose(Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, shape: torch.Size, function: Callable[[Tensor], Tensor]) -> Any:
        ctx.function = function
        with torch.enable_grad():
            x = cotangent.new_zeros(shape, requires_grad=True)
            y = function(x)
        return torch.autograd.grad(y, x, cotangent)[0]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        return ctx.function(tangent), None, None


def _unwritable(x: Tensor) -> bool:
    """What a call in place is left to PyTorch for: its error comes before the write."""
    return x.is_leaf or x._base is not None


def _relu(x: Tensor, inplace: bool = False) -> Any:
    if inplace and _unwritable(x):
        return F.relu(x, True)
    return _Piecewise.apply(x, torch.relu_ if inplace else torch.relu, *piecewise("relu"))


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    slope, from_output = piecewise("leaky_relu", negative_slope)
    if inplace and (_unwritable(x) or not from_output):
        return F.leaky_relu(x, negative_slope, True)
    if not inplace:  # the input is kept, as in PyTorch: the output may be written later
        slope, from_output = piecewise("leaky_relu_of_input", negative_slope)
    return _Piecewise.apply(x, lambda x: F.leaky_relu(x, negative_slope, inplace), slope, from_output)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    if inplace and _unwritable(x):
        return F.hardtanh(x, min_val, max_val, True)
    slope, _ = piecewise("hardtanh", min_val, max_val)  # tells the same from input and output
    return _Piecewise.apply(x, lambda x: F.hardtanh(x, min_val, max_val, inplace), slope, inplace)


def _relu6(x: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(x, 0.0, 6.0, inplace)


def _max_pool(function: Callable[..., Any], dims: int) -> Callable[..., Any]:
    def layer(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("return_indices") or x.dim() != dims + 2:
            return function(x, *args, **kwargs)
        return _MaxPool.apply(x, function, args, kwargs, dims)

    return layer


def _average_pool(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: _Linear.apply(x, lambda t: function(t, *args, **kwargs))


_AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE_AVERAGES = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
LAYERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, torch.Tensor.relu_), lambda x: _relu(x, True)),
    F.leaky_relu: _leaky_relu,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    **{function: _max_pool(function, dims) for function, dims in DIMS.items()},
    **{function: _average_pool(function) for function in (*_AVERAGES, *_ADAPTIVE_AVERAGES)},
}


_entered = threading.local()


def depth() -> int:
    """How many ``fast_double_backward()`` contexts this thread is in."""
    return getattr(_entered, "depth", 0)


class fast_double_backward(TorchFunctionMode):
    """Context: layers called inside it have the efficient double backward.

    Values and gradients are PyTorch's, for derivatives of any order; the weight gradients of an MLP's penalty are the
    same to the last bit. Layers: ReLU, LeakyReLU, Hardtanh, ReLU6, max, average and adaptive pooling, also in place;
    every other layer runs as it is. The penalties of this library use it by themselves where a critic has a layer
    without a rule; called inside it, they can be differentiated to any order.
    """

    def __enter__(self) -> fast_double_backward:
        _entered.depth = depth() + 1
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        _entered.depth = depth() - 1
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layer = LAYERS.get(func)
        if layer is not None and torch.is_grad_enabled() and args and args[0].requires_grad:
            return layer(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
