"""Autograd of raw ops: calling a pair of Functions, and derivatives beyond the first.

The first derivative is a kernel. Higher derivatives are those of the reference, by ``torch.func.vjp``, so every order
exists and is exact. Under ``torch.func`` and in forward mode the reference replaces the Functions. On plain tensors
csrc/differentiable.cpp is in place of a Function, and calls its ``gradients`` for a derivative with a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.private import any_requires_grad, dual_level, transforms_active


class Differentiable(Function):
    """Base class of the Functions, with a generated vmap rule."""

    generate_vmap_rule = True

    @staticmethod
    def arguments(*args: Any) -> tuple[Any, ...]:
        """Return the arguments of ``forward`` from those of the op."""
        return args

    @classmethod
    def gradients(cls, needs: Sequence[bool], args: Sequence[Any], results: Sequence[Any], cotangent: Tensor) -> Any:
        """Compute the gradients of a call of the op, None where its tensors are None."""
        context = _Context(needs)
        cls.setup_context(context, cls.arguments(*args), results)
        return cls.backward(context, cotangent, *[None] * (len(results) - 1))


class _Context:
    """What Functions use of a context."""

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor | None) -> None:
        """Ignore the tensors: the first result alone is differentiated."""


def apply(function: type[Differentiable], *args: Any) -> Any:
    """Call ``function.apply``, skipping costs larger than a small op: an unused graph, and binding of arguments."""
    if transforms_active() or dual_level() >= 0:  # PyTorch's own operations support every mode and order
        with backends.backend("reference"):
            return function.forward(*args)
    if is_compiling():
        return function.apply(*args)
    if not (torch.is_grad_enabled() and any_requires_grad(*args)):
        return function.forward(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def second_order(
    value: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor, tangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Compute the derivative of (cotangent, *primals) -> vjp of ``value``, applied to ``tangents``, in that order."""

    def first_order(cotangent: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.vjp(value, *primals)[1](cotangent))

    return tuple(torch.func.vjp(first_order, cotangent, *primals)[1](tuple(tangents)))
