"""A context in which layers have the efficient double backward: the drop-in way."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from gpkernels.critic.layers import LAYERS, NUMBERS
from gpkernels.private import dual_level, function_mode_count, function_modes, transforms_active


class fast_double_backward(TorchFunctionMode):
    """Context: layers called inside it have the efficient double backward.

    Values and gradients are PyTorch's, for derivatives of any order; the weight gradients of an MLP's penalty are the
    same to the last bit. Where PyTorch's are zeros because nothing depends on a weight, there may be None. Layers:
    ReLU, LeakyReLU, Hardtanh, ReLU6, also in place; max, average and adaptive pooling of images. Every other layer runs
    as it is, and so does everything in transforms of ``torch.func``. ``torch.compile`` traces these layers, too; it
    traces derivatives where its option ``trace_autograd_ops`` lets it. The penalties of this library can be
    differentiated to any order where they are called inside it.

    Example:
        >>> with gpkernels.fast_double_backward():
        ...     (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    """

    # Enter and exit are the base's: a graph break inside a mode that has its own is more than torch.compile can do.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _transformed():  # these have derivatives of their own
            return func(*args, **kwargs)
        layer = LAYERS.get(func)
        if layer is None or not (torch.is_grad_enabled() and args and args[0].requires_grad):
            return func(*args, **kwargs)
        if is_compiling():
            from gpkernels.critic.traced import layer_in_graph  # it imports the compiler, which is at work here

            return layer_in_graph(NUMBERS[func], *args, **kwargs)
        return layer(*args, **kwargs)


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work."""
    return transforms_active() or dual_level() >= 0


def depth() -> int:
    """How many ``fast_double_backward()`` contexts this thread is in."""
    if not function_mode_count():
        return 0
    return sum(isinstance(mode, fast_double_backward) for mode in function_modes())
