"""Gradient penalties of any critic: an ``nn.Module`` or a callable that maps (N, *) to scores.

A score may be (N,), (N, 1) or a map (N, *): whatever its shape it is summed before it is differentiated, as everyone
does. A critic that returns a tuple gives its scores first. Every function returns the bare expectation, in at least
float32, with a graph to the critic's weights where grad mode is on; coefficients belong to the caller. The inputs are
detached: a penalty has no gradient with respect to real, fake or points.

All of them take these options:

- reduction: "mean", "sum", or "none" for one value per sample, which can then be weighted.
- pack: so many consecutive samples have one score and one norm (Lin et al. 2018, PacGAN); N is a multiple of it.
- critic_args, critic_kwargs: further inputs, such as labels, passed on after x and not differentiated.

Errors: TypeError or ValueError naming the argument, before the critic is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkernels.critic.call import Group, check_scores, scores_of
from gpkernels.critic.double_backward import depth, transformed
from gpkernels.critic.gradient import Inputs
from gpkernels.critic.parts import Between, Norm, Task, points_of
from gpkernels.critic.step import Begun, penalty_at_once, penalty_on_gradient
from gpkernels.gradients import gradient_of
from gpkernels.ops.checks import check_batch, check_eps, check_nonnegative, check_pack, check_pair
from gpkernels.ops.gradient_norm_penalty import REDUCTIONS, check_power, check_reduction
from gpkernels.ops.instance_noise import instance_noise_op
from gpkernels.ops.interpolate import draw_eps
from gpkernels.ops.philox import draw_key
from gpkernels.ops.tensors import promote
from gpkernels.private import BatchNorm

Critic = Callable[..., Any]
Kwargs = Mapping[str, Any]
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
    reduction: str = "mean",
    power: float = 2.0,
    pack: int = 1,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Kwargs | None = None,
) -> Tensor:
    """Penalty on the gradient norm between real and fake samples (Gulrajani et al. 2017, eq. 3).

    E (|grad D(x)| - target)^2 at x = eps * real + (1 - eps) * fake, detached.

    Args:
        critic: maps (N, *) to scores, see the module's description.
        real, fake: samples, two batches of one shape.
        target: the norm that is not penalised.
        one_sided: penalise max(0, |grad D| - target) instead, which lets smaller norms be.
        eps: one per sample, or one per pack; drawn as ``torch.rand(N, 1, ..., 1)`` draws it if None.
        generator: draws eps.
        reduction, pack, critic_args, critic_kwargs: see the module's description.
        power: of the difference from the target; at least 1.

    Shape:
        - real, fake: (N, *)
        - eps: (N,) or (N, 1, ..., 1); N / pack in place of N where samples are packed
        - output: scalar, or (N / pack,) for ``reduction="none"``

    Returns:
        The penalty, in at least float32, differentiable once by the critic's weights; inside
        ``gpkernels.fast_double_backward()`` to any order.

    Raises:
        TypeError, ValueError: naming the argument; also for a critic that gives fewer scores than packs.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> real, fake = torch.randn(256, 2), torch.randn(256, 2)
        >>> loss = critic(fake).mean() - critic(real).mean() + 10 * gpkernels.gradient_penalty(critic, real, fake)
        >>> loss.backward()
    """
    norm = _norm(target, reduction, one_sided, power)
    plain = pack == 1 and not is_compiling()
    if plain and eps is None and _alike(real, fake):
        eps = draw_eps(real, generator)
    begun = None
    if plain and eps is not None:
        found = _at_once(critic, Between(real, fake, eps), norm, critic_args, critic_kwargs)
        if isinstance(found, Tensor):
            return found
        begun = found
    check_pair("real", real, "fake", fake)
    eps = eps_of(real, eps, generator, check_pack("real", real, pack))
    real, fake = promote(real, fake)
    return _penalty(critic, Between(real, fake, eps), norm, pack, critic_args, critic_kwargs, begun)


def _alike(real: object, fake: object) -> bool:
    """Whether the usual checks will find nothing wrong with a pair of batches."""
    if not (isinstance(real, Tensor) and isinstance(fake, Tensor)):
        return False
    return real.dim() > 0 and real.shape == fake.shape and real.dtype == fake.dtype and real.is_floating_point()


def _at_once(
    critic: Critic, points: Between, norm: Norm, args: Sequence[Any], kwargs: Kwargs | None
) -> Tensor | Begun | None:
    """Compute the penalty in C++, which declines whatever the checks would refuse."""
    if transformed() or depth() or not callable(critic) or norm.reduction == REDUCTIONS["none"]:
        return None
    warn_of_batch_norm(critic)
    return penalty_at_once(critic, points, _task(norm, torch.is_grad_enabled(), 1), args, kwargs)


@lru_cache(64)
def _task(norm: Norm, gradients: bool, pack: int) -> Task:
    return Task(None, (("points", norm),), None, gradients, pack)


def r1_penalty(
    critic: Critic,
    real: Tensor,
    *,
    reduction: str = "mean",
    pack: int = 1,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Kwargs | None = None,
) -> Tensor:
    """Squared gradient norm at real samples, E |grad D(x)|^2 (Mescheder et al. 2018, eq. 9, without its gamma / 2).

    Args:
        critic: maps (N, *) to scores, see the module's description.
        real: samples.
        reduction, pack, critic_args, critic_kwargs: see the module's description.

    Shape:
        - real: (N, *)
        - output: scalar, or (N / pack,) for ``reduction="none"``

    Returns:
        The penalty, as :func:`gradient_penalty` gives it.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> gamma, real = 10.0, torch.randn(16, 1, 8, 8)
        >>> (gamma / 2 * gpkernels.r1_penalty(critic, real)).backward()
    """
    check_batch("real", real)
    check_pack("real", real, pack)
    return _penalty(critic, real, _norm(0.0, reduction), pack, critic_args, critic_kwargs)


def r2_penalty(
    critic: Critic,
    fake: Tensor,
    *,
    reduction: str = "mean",
    pack: int = 1,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Kwargs | None = None,
) -> Tensor:
    """Squared gradient norm at generated samples, E |grad D(x)|^2 (Mescheder et al. 2018, eq. 10, without gamma / 2).

    Args:
        critic: maps (N, *) to scores, see the module's description.
        fake: samples.
        reduction, pack, critic_args, critic_kwargs: see the module's description.

    Shape:
        - fake: (N, *)
        - output: scalar, or (N / pack,) for ``reduction="none"``

    Returns:
        The penalty, as :func:`gradient_penalty` gives it.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> weights = torch.rand(16)  # of the samples
        >>> penalty = gpkernels.r2_penalty(critic, torch.randn(16, 1, 8, 8), reduction="none")
        >>> (weights * penalty).sum().backward()
    """
    check_batch("fake", fake)
    check_pack("fake", fake, pack)
    return _penalty(critic, fake, _norm(0.0, reduction), pack, critic_args, critic_kwargs)


def dragan_penalty(
    critic: Critic,
    real: Tensor,
    *,
    target: float = 1.0,
    scale: float = 0.5,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    pack: int = 1,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Kwargs | None = None,
) -> Tensor:
    """Penalty on the gradient norm around real samples (Kodali et al. 2017, Algorithm 1).

    E (|grad D(x)| - target)^2 at x = real + scale * std(real) * U[0, 1) per element; std is over the whole batch, with
    Bessel's correction.

    Args:
        critic: maps (N, *) to scores, see the module's description.
        real: samples, of at least two elements in all.
        target: the norm that is not penalised.
        scale: how far from the samples the gradient is taken, in standard deviations.
        generator: draws the noise.
        reduction, pack, critic_args, critic_kwargs: see the module's description.

    Shape:
        - real: (N, *)
        - output: scalar, or (N / pack,) for ``reduction="none"``

    Returns:
        The penalty, as :func:`gradient_penalty` gives it.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> gpkernels.dragan_penalty(critic, torch.randn(16, 1, 8, 8)).backward()
    """
    check_batch("real", real)
    norm = _norm(target, reduction)
    check_pack("real", real, pack)
    points = dragan_points(real, scale, generator)
    return _penalty(critic, points, norm, pack, critic_args, critic_kwargs)


def eikonal_loss(
    field: Critic,
    points: Tensor,
    *,
    reduction: str = "mean",
    power: float = 2.0,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Kwargs | None = None,
) -> Tensor:
    """Eikonal term of a signed distance field, E (|grad f(x)| - 1)^2 over points (Gropp et al. 2020, eq. 2).

    Args:
        field: maps points to distances, of any shape.
        points: each is a row; the norm is over its d coordinates.
        reduction, critic_args, critic_kwargs: see the module's description.
        power: of the difference; 1 for SIREN's E ||grad f| - 1| (Sitzmann et al. 2020, eq. 6).

    Shape:
        - points: (*, d)
        - output: scalar, or (*) for ``reduction="none"``

    Returns:
        The loss, as :func:`gradient_penalty` gives it. For losses of the gradient itself, such as its difference from
        normals, there is :func:`input_gradient`.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> field = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Softplus(100), torch.nn.Linear(64, 1))
        >>> (0.1 * gpkernels.eikonal_loss(field, torch.randn(1024, 3))).backward()
    """
    check_batch("points", points)
    return _penalty(field, points, _norm(1.0, reduction, power=power), 0, critic_args, critic_kwargs)


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


def eps_of(real: Tensor, eps: Tensor | None, generator: torch.Generator | None, pack: int) -> Tensor:
    """One eps per sample, those of a pack being one: as given, or drawn."""
    packs = real if pack == 1 else real[::pack]
    if eps is None:
        eps = draw_eps(packs, generator)
    else:
        check_eps(eps, packs)
    return eps if pack == 1 else eps.repeat_interleave(pack, 0)


def _norm(target: float, reduction: str, one_sided: bool = False, power: float = 2.0) -> Norm:
    return Norm(check_nonnegative("target", target), bool(one_sided), check_power(power), check_reduction(reduction))


def _penalty(
    critic: Critic,
    points: Tensor | Between,
    norm: Norm,
    pack: int,
    args: Sequence[Any] = (),
    kwargs: Kwargs | None = None,
    begun: Begun | None = None,
) -> Tensor:
    """The penalty at the points; of PyTorch's own operations where more derivatives are to be taken."""
    if not callable(critic):
        raise TypeError(f"critic: expected a module or a callable, got {type(critic).__name__}")
    if norm.reduction == REDUCTIONS["none"] or transformed() or (depth() and not is_compiling()):
        return _of_gradient(critic, points, norm, pack, args, kwargs)
    task = (_task.__wrapped__ if is_compiling() else _task)(norm, torch.is_grad_enabled(), pack)
    eagerly = lambda: penalty_on_gradient(critic, points, task, args, kwargs, begun)  # noqa: E731
    if is_compiling():
        from gpkernels.critic.traced import step_in_graph  # it imports the compiler, which is at work here

        groups = [[Group("points", points, True)]]
        found = step_in_graph(critic, groups, task, (1.0,), eagerly, args=args, kwargs=kwargs)
        return found if isinstance(found, Tensor) else found[0]
    warn_of_batch_norm(critic)
    return eagerly()


def _of_gradient(
    critic: Critic,
    points: Tensor | Between,
    norm: Norm,
    pack: int,
    args: Sequence[Any],
    kwargs: Kwargs | None,
) -> Tensor:
    """The penalty, made of the gradient as a value."""
    warn_of_batch_norm(critic)
    x = points_of(points).detach()
    output, gradient = gradient_of(critic, Inputs(x), args, kwargs or {}, "critic")
    check_scores(scores_of(output), x, pack)
    return norm.of(gradient, pack)


def warn_of_batch_norm(critic: Critic) -> None:
    """Warn once of a critic with BatchNorm in training mode."""
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
