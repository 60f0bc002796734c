"""Gradient penalties of any critic: an ``nn.Module`` or a callable that maps (N, *) to scores.

A score may be (N,), (N, 1) or a map (N, *): whatever its shape it is summed before it is differentiated, as everyone
does. A critic that returns a tuple gives its scores first. Every function returns the bare expectation, in at least
float32, with a graph to the critic's weights where grad mode is on; coefficients belong to the caller. The inputs are
detached: a penalty has no gradient with respect to real, fake or points.
Errors: TypeError or ValueError naming the argument, before the critic is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from gpkernels.critic.call import Group, scores_of
from gpkernels.critic.double_backward import depth, fast_double_backward
from gpkernels.critic.parts import Between, Task, points_of
from gpkernels.critic.step import Begun, penalty_at_once, penalty_on_gradient
from gpkernels.ops.checks import check_batch, check_eps, check_nonnegative, check_pair
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty
from gpkernels.ops.instance_noise import instance_noise_op
from gpkernels.ops.interpolate import draw_eps
from gpkernels.ops.philox import draw_key
from gpkernels.ops.tensors import promote
from gpkernels.private import BatchNorm, transforms_active

Critic = Callable[..., Any]
_looked_at: dict[bool, WeakSet[nn.Module]] = {True: WeakSet(), False: WeakSet()}  # in training and out of it


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """E (|grad D(x)| - target)^2 at x between real and fake (Gulrajani et al. 2017, eq. 3).

    real, fake: (N, *), one shape. one_sided: max(0, |grad D| - target)^2 instead. eps: (N,) or (N, 1, ..., 1), one
    per sample; if None it is drawn as ``torch.rand(N, 1, ..., 1)`` draws it, by ``generator`` if given. critic_args,
    critic_kwargs: further inputs, such as labels, passed after x and not differentiated.
    """
    target = check_nonnegative("target", target)
    how = target, bool(one_sided), critic_args, critic_kwargs
    begun = None if eps is None else _at_once(critic, Between(real, fake, eps), *how)
    if isinstance(begun, Tensor):
        return begun
    check_pair("real", real, "fake", fake)
    if eps is not None:
        check_eps(eps, real)
    eps = draw_eps(real, generator) if eps is None else eps
    real, fake = promote(real, fake)
    return _penalty(critic, Between(real, fake, eps), *how, begun=begun)


def _at_once(critic: Critic, points: Between, *how: Any) -> Tensor | Begun | None:
    """The penalty by C++, which refuses what it finds odd; None leaves that to the checks."""
    if is_compiling() or transformed() or depth() or not callable(critic):
        return None
    _warn_of_batch_norm(critic)
    return penalty_at_once(critic, points, *how)


def r1_penalty(critic: Critic, real: Tensor) -> Tensor:
    """E |grad D(x)|^2 at real data (Mescheder et al. 2018, eq. 9, without its gamma / 2). real: (N, *)."""
    check_batch("real", real)
    return _penalty(critic, real, 0.0)


def r2_penalty(critic: Critic, fake: Tensor) -> Tensor:
    """E |grad D(x)|^2 at generated data (Mescheder et al. 2018, eq. 10, without its gamma / 2). fake: (N, *)."""
    check_batch("fake", fake)
    return _penalty(critic, fake, 0.0)


def dragan_penalty(
    critic: Critic,
    real: Tensor,
    *,
    target: float = 1.0,
    scale: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E (|grad D(x)| - target)^2 at x = real + scale * std(real) * U[0, 1) per element (Kodali et al. 2017).

    real: (N, *); std is over the whole batch, with Bessel's correction.
    """
    target = check_nonnegative("target", target)
    return _penalty(critic, dragan_points(real, scale, generator), target)


def eikonal_loss(field: Critic, points: Tensor) -> Tensor:
    """E (|grad f(x)| - 1)^2 over points, the eikonal term of a signed distance field (Gropp et al. 2020, eq. 2).

    points: (*, d); each point is a row, the norm is over its d coordinates.
    """
    check_batch("points", points)
    return _penalty(field, points, 1.0, by_point=True)


def dragan_points(real: Tensor, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """real + scale * std(real) * U[0, 1) per element, where DRAGAN penalises."""
    check_batch("real", real)
    if real.numel() < 2:
        raise ValueError(f"real: expected at least two elements, to have a spread, got shape {tuple(real.shape)}")
    scale = check_nonnegative("scale", scale)
    real = real.detach()
    spread = real.to(torch.promote_types(real.dtype, torch.float32)).std().reshape(1)
    points: Tensor = instance_noise_op(real, scale, spread, draw_key(real.device, generator), False)
    return points


def _penalty(
    critic: Critic,
    points: Tensor | Between,
    target: float,
    one_sided: bool = False,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    by_point: bool = False,
    begun: Begun | None = None,
) -> Tensor:
    """The penalty at the points; of PyTorch's own operations where more derivatives are to be taken."""
    if not callable(critic):
        raise TypeError(f"critic: expected a module or a callable, got {type(critic).__name__}")
    how = target, one_sided, args, kwargs, by_point, begun
    eagerly = lambda: penalty_on_gradient(critic, points, *how)  # noqa: E731
    if is_compiling() and not transformed():
        from gpkernels.critic.traced import step_in_graph  # it imports the compiler, which is at work here

        task = Task(None, target, one_sided, by_point, None, torch.is_grad_enabled())
        found = step_in_graph(critic, [[Group("points", points, True)]], task, 1.0, eagerly, args=args, kwargs=kwargs)
        return found if isinstance(found, Tensor) else found[0]
    if not (transformed() or depth()):
        _warn_of_batch_norm(critic)
        return eagerly()
    grad = input_gradient(critic, points_of(points), args, kwargs)
    return gradient_norm_penalty(grad.reshape(-1, grad.shape[-1]) if by_point else grad, target, one_sided=one_sided)


def input_gradient(
    critic: Critic, x: Tensor, critic_args: Sequence[Any] = (), critic_kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """Gradient of the summed scores at x, (N, *), differentiable once more where grad mode is on.

    Raises TypeError if the critic gives no tensor, ValueError if its scores do not depend on x.
    """
    _warn_of_batch_norm(critic)
    kwargs = critic_kwargs or {}
    if transformed():  # the transform around this differentiates it once more
        return torch.func.grad(lambda x: scores_of(critic(x, *critic_args, **kwargs)).sum())(x.detach())
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), fast_double_backward():
        x = x.detach().requires_grad_()
        scores = scores_of(critic(x, *critic_args, **kwargs))
        if not scores.requires_grad:
            raise ValueError("critic: expected scores that depend on the input, got scores that do not")
        ones = torch.ones_like(scores)
        (grad,) = torch.autograd.grad(scores, x, ones, create_graph=differentiable, allow_unused=True)
    if grad is None:
        raise ValueError("critic: expected scores that depend on the input, got scores that do not")
    return grad


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, which differentiates by itself.

    Raises RuntimeError in ``torch.export``, whose programs hold calls that autograd has not seen.
    """
    if is_exporting():
        raise RuntimeError("torch.export cannot hold a gradient of the critic; export the critic, or use torch.compile")
    return transforms_active()


def _warn_of_batch_norm(critic: Critic) -> None:
    if not isinstance(critic, nn.Module) or critic in (seen := _looked_at[critic.training]) or transformed():
        return
    seen.add(critic)
    for module in critic.modules():
        if isinstance(module, BatchNorm) and module.training:
            warnings.warn(
                "the critic has BatchNorm in training mode, which mixes samples: the penalty is not per sample",
                stacklevel=4,
            )
            return
