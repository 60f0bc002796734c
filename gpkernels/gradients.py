"""The gradient of a model at its input, as a value that any loss may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.critic.call import scores_of
from gpkernels.critic.double_backward import transformed
from gpkernels.critic.gradient import Inputs, value_and_gradient
from gpkernels.ops.checks import check_floating

Model = Callable[..., Any]


def input_gradient(
    model: Model, x: Any, *, critic_args: Sequence[Any] = (), critic_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Gradient of a model's summed output with respect to its input, for use in a loss.

    What ``torch.autograd.grad(model(x).sum(), x, create_graph=True)`` gives, at two thirds of the work for a
    piecewise-linear model: the loss may be any function of the gradient, such as a norm, a difference from normals or
    from forces, a cosine. See :func:`value_and_input_gradient` for all details.

    Args:
        model: any callable that maps ``x`` to a tensor, or to a tuple or list with that tensor first.
        x: a floating-point tensor, or a tuple, list or dict (also nested) of tensors.
        critic_args, critic_kwargs: further arguments, passed on after ``x`` and not differentiated.

    Returns:
        The gradient, of the structure, shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> field = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Softplus(100), torch.nn.Linear(64, 1))
        >>> points, normals = torch.randn(256, 3), torch.nn.functional.normalize(torch.randn(256, 3))
        >>> gradient = gpkernels.input_gradient(field, points)
        >>> loss = (gradient.norm(dim=-1) - 1).abs().mean() + (gradient - normals).norm(dim=-1).mean()
        >>> loss.backward()
    """
    return value_and_input_gradient(model, x, critic_args=critic_args, critic_kwargs=critic_kwargs)[1]


def value_and_input_gradient(
    model: Model, x: Any, *, critic_args: Sequence[Any] = (), critic_kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """A model's output and the gradient of its sum with respect to the input, for use in one loss.

    Both are differentiable once, by the weights and by whatever else the model computes with, and with respect to
    ``x`` where it requires a gradient; ``x`` may be an intermediate tensor, such as normalised observations. The model
    is called once. A further derivative raises; inside ``gpkernels.fast_double_backward()`` there is every order.

    Args:
        model: any callable that maps ``x`` to a tensor, or to a tuple or list with that tensor first.
        x: a floating-point tensor, or a tuple, list or dict (also nested) of tensors. Other entries are passed on.
        critic_args, critic_kwargs: further arguments, passed on after ``x`` and not differentiated.

    Shape:
        - x: any; where it is a batch of N samples that do not meet in the model, each has the gradient of its own
          value.
        - output: as the model gives it.

    Returns:
        ``(value, gradient)``: the model's output, and the gradient, of the structure, shape and dtype of ``x``; None
        for tensors that the value does not depend on (zeros inside transforms of ``torch.func``).

    Raises:
        TypeError: for a model that is not callable or gives no tensor, an ``x`` without floating-point tensors.
        ValueError: where the value depends on nothing in ``x``.

    Example:
        >>> energy_model = lambda positions: (positions.pdist() ** -6).sum()
        >>> positions = torch.randn(5, 3)
        >>> energy, gradient = gpkernels.value_and_input_gradient(lambda r: r.square().sum(), positions)
        >>> forces = -gradient
    """
    return gradient_of(model, _checked(model, x), critic_args, critic_kwargs or {})


def gradient_of(
    model: Model, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "model"
) -> tuple[Any, Any]:
    """The output of a model, an argument of that name, and the gradient at its inputs, without checks."""
    eagerly = lambda: value_and_gradient(model, inputs, args, kwargs, name)  # noqa: E731
    if transformed():
        return _by_transform(model, inputs, args, kwargs, name)
    if is_compiling():
        from gpkernels.critic.traced import gradient_in_graph  # it imports the compiler, which is at work here

        return gradient_in_graph(model, inputs, args, kwargs, name, eagerly)
    return eagerly()


def _checked(model: Model, x: Any) -> Inputs:
    if not callable(model):
        raise TypeError(f"model: expected a module or a callable, got {type(model).__name__}")
    inputs = Inputs(x)
    if not inputs.tensors:
        if isinstance(x, Tensor):
            check_floating("x", x)
        raise TypeError(
            f"x: expected a floating-point tensor, or a tuple, list or dict of them, got {type(x).__name__}"
        )
    for t in inputs.tensors:
        check_floating("x", t)
    return inputs


def _by_transform(
    model: Model, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> tuple[Any, Any]:
    """The same by ``torch.func``; the transform around it differentiates it once more."""

    def summed(tensors: list[Tensor]) -> tuple[Tensor, Any]:
        output = model(inputs.filled(tensors), *args, **kwargs)
        return scores_of(output, name).sum(), output

    gradients, output = torch.func.grad(summed, has_aux=True)(inputs.tensors)
    return output, inputs.gradients(gradients)
