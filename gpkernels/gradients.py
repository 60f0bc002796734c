"""The input gradient of a model, as a value that any loss may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.critic.call import scores_of
from gpkernels.critic.double_backward import depth, transformed
from gpkernels.critic.gathered import with_gathered
from gpkernels.critic.gradient import Begun, Inputs, at_once, value_and_gradient
from gpkernels.ops.checks import check_callable, check_floating, check_further, check_own

Model = Callable[..., Any]


def input_gradient(
    model: Model, x: Any, *, critic_args: Sequence[Any] = (), critic_kwargs: Mapping[str, Any] | None = None
) -> Any:
    r"""Compute the gradient of a model's summed output with respect to its input, for use in a loss.

    .. math::
        \nabla_x \sum_i f_i(x)

    The result is that of ``torch.autograd.grad(model(x).sum(), x, create_graph=True)``, and the loss may be any
    function of it, such as a norm, a difference from normals or forces, or a cosine. For a piecewise-linear model the
    gradient and the weight gradients of the loss cost 4 forward passes instead of 6. Differentiable once, and to any
    order inside :func:`fast_double_backward`; see :func:`value_and_input_gradient`.

    Args:
        model (Callable): a module or any other callable that maps ``x`` to a tensor, or to a tuple or list with that
            tensor first.
        x (Tensor or tuple, list, dict): a floating-point tensor, or a possibly nested structure of tensors; other
            entries are passed on as they are. It may be an intermediate tensor.
        critic_args (Sequence): further positional arguments of the model; no input gradient is computed for them.
            Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - x: any
        - Output: as ``x``

    Returns:
        The gradient, with the structure, shapes and dtypes of ``x``; None for tensors that the output does not depend
        on.

    Raises:
        TypeError: ``model`` cannot be called or returns no tensor, or ``x`` has no dense floating-point tensor.
        ValueError: the output does not depend on ``x``.

    Example:
        >>> field = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Softplus(100), torch.nn.Linear(64, 1))
        >>> points, normals = torch.randn(256, 3), torch.nn.functional.normalize(torch.randn(256, 3))
        >>> gradient = gpkernels.input_gradient(field, points)
        >>> loss = (gradient.norm(dim=-1) - 1).abs().mean() + (gradient - normals).norm(dim=-1).mean()
        >>> loss.backward()
    """
    return gradient_of(model, x, critic_args, critic_kwargs)[1]


def value_and_input_gradient(
    model: Model, x: Any, *, critic_args: Sequence[Any] = (), critic_kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    r"""Compute a model's output and the gradient of its sum with respect to the input, for use in one loss.

    .. math::
        f(x), \quad \nabla_x \sum_i f_i(x)

    The model is called once. Where its samples are independent of each other, each has the gradient of its own value.
    Both results are differentiable once, with respect to all that the model computes with, and to ``x`` where it
    requires a gradient; differentiating twice raises, except inside :func:`fast_double_backward`, where every order
    exists.

    Args:
        model (Callable): a module or any other callable that maps ``x`` to a tensor, or to a tuple or list with that
            tensor first.
        x (Tensor or tuple, list, dict): a floating-point tensor, or a possibly nested structure of tensors; other
            entries are passed on as they are. It may be an intermediate tensor.
        critic_args (Sequence): further positional arguments of the model; no input gradient is computed for them.
            Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - x: any
        - Output: as the model returns it, and as ``x``

    Returns:
        tuple: the model's output, and the gradient, with the structure, shapes and dtypes of ``x``; None for tensors
        that the output does not depend on (zeros inside transforms of ``torch.func``).

    Raises:
        TypeError: ``model`` cannot be called or returns no tensor, or ``x`` has no dense floating-point tensor.
        ValueError: the output does not depend on ``x``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> positions, energies, forces = torch.randn(32, 3), torch.randn(32, 1), torch.randn(32, 3)
        >>> energy, gradient = gpkernels.value_and_input_gradient(model, positions)
        >>> loss = (energy - energies).square().mean() + (-gradient - forces).square().mean()
        >>> loss.backward()
    """
    return gradient_of(model, x, critic_args, critic_kwargs)


def gradient_of(
    model: Model, x: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, name: str = "model"
) -> tuple[Any, Any]:
    """Return the output of a model, an argument of that name, and the gradient at its input."""
    check_further(args, kwargs)
    found = None if is_compiling() else at_once(model, x, args, kwargs)
    if found is not None and not isinstance(found, Begun):
        return found
    inputs, begun, kwargs = _checked(model, x, name), found, kwargs or {}
    own = partial(value_and_gradient, model, inputs, args, kwargs, name, depth() > 0, begun)
    eagerly = partial(with_gathered, own, model)
    if transformed():
        return _by_transform(model, inputs, args, kwargs, name)
    if is_compiling():
        from gpkernels.critic.traced import gradient_in_graph  # it imports the compiler, which is at work here

        return gradient_in_graph(model, inputs, args, kwargs, name, eagerly)
    return eagerly()


def _checked(model: Model, x: Any, name: str) -> Inputs:
    check_callable(name, model)
    inputs = Inputs(x)
    if not inputs.tensors:
        if isinstance(x, Tensor):
            check_floating("x", x)
        raise TypeError(
            f"x: expected a floating-point tensor, or a tuple, list or dict of them, got {type(x).__name__}"
        )
    for t in inputs.tensors:
        check_floating("x", t)
        check_own("x", t)
    return inputs


def _by_transform(
    model: Model, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> tuple[Any, Any]:
    """Compute the same by ``torch.func``; the transform around it differentiates it once more."""

    def summed(tensors: list[Tensor]) -> tuple[Tensor, Any]:
        output = model(inputs.filled(tensors), *args, **kwargs)
        return scores_of(output, name).sum(), output

    gradients, output = torch.func.grad(summed, has_aux=True)(inputs.tensors)
    return output, inputs.gradients(gradients)
