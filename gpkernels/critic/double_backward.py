"""Context in which piecewise-linear layers have a double backward that skips exact zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling, is_exporting

from gpkernels.critic.layers import LAYERS, NUMBERS
from gpkernels.critic.surroundings import Composing
from gpkernels.private import dual_level, function_mode_count, function_modes, saved_tensors_hooks, transforms_active


class fast_double_backward(Composing):
    """Context manager in which piecewise-linear layers have a double backward that skips zero gradients.

    PyTorch's double backward of a ReLU or a pooling returns exact zeros for the layer's input, so that the whole
    forward graph is differentiated once more on zeros. Layers called inside this context return no gradient instead.
    Values and gradients are PyTorch's, for derivatives of any order; where PyTorch's gradient is zero because nothing
    depends on a weight, it may be None.

    Layers: ReLU, LeakyReLU, Hardtanh and ReLU6, also in place; max, average and adaptive pooling of images. Every other
    operation is unchanged, and so is everything in checkpointed regions and inside transforms of ``torch.func``.
    ``torch.compile`` traces these layers, too, and derivatives where its option ``trace_autograd_ops`` is on. Penalties
    of this library that are called inside are differentiable to any order.

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
        layer = LAYERS.get(func)  # first: a compiler that asks for transforms in every call fails at graph breaks
        if layer is None or not (torch.is_grad_enabled() and args and args[0].requires_grad):
            return func(*args, **kwargs)
        if _composes_alone() or _checkpointed():  # transforms have derivatives of their own
            return func(*args, **kwargs)
        if is_compiling():
            from gpkernels.critic.traced import layer_in_graph  # it imports the compiler, which is at work here

            return layer_in_graph(NUMBERS[func], *args, **kwargs)
        return layer(*args, **kwargs)


def _composes_alone() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work."""
    return transforms_active() or dual_level() >= 0


def _checkpointed() -> bool:
    """Whether the call is made again outside this context, and has to save the same tensors there."""
    hooks = None if is_compiling() else saved_tensors_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


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
