"""Gradient penalties of any critic: a module or another callable that maps a batch to scores.

Every function returns the bare expectation, in at least float32, with a graph to the critic's weights where grad mode
is on; coefficients belong to the caller. The inputs are detached: a penalty has no gradient with respect to real, fake
or points. Errors are raised before the critic is called, apart from those about its scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkernels.critic.call import Group, check_scores, scores_of
from gpkernels.critic.double_backward import depth, transformed
from gpkernels.critic.gathered import with_gathered
from gpkernels.critic.parts import Between, Norm, Task, called, points_of
from gpkernels.critic.settled import AT_REAL, BETWEEN, MADE, Memory, Way, record_of
from gpkernels.critic.step import Begun, penalty_on_gradient
from gpkernels.gradients import gradient_of
from gpkernels.ops.checks import (
    check_batch,
    check_callable,
    check_eps,
    check_flag,
    check_further,
    check_nonnegative,
    check_pack,
    check_pair,
)
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
    r"""Compute the penalty on a critic's gradient norms between real and fake samples, as in WGAN-GP.

    .. math::
        \mathbb{E} \bigl| \lVert \nabla D(\hat{x}) \rVert_2 - \text{target} \bigr|^{\text{power}}, \qquad
        \hat{x} = \epsilon \, \text{real} + (1 - \epsilon) \, \text{fake}

    Scores of any shape are summed before they are differentiated. Where :math:`\nabla D = 0` the subgradient is 0.
    Differentiable once with respect to all that the critic computes with, its weights above all, and to any order
    inside :func:`fast_double_backward`. The samples are detached.

    Args:
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with the scores
            first.
        real (Tensor): real samples.
        fake (Tensor): generated samples, of the same shape and on the same device.
        target (float): norm that is not penalised, finite and at least 0. Default: 1.
        one_sided (bool): penalise :math:`\max(0, \lVert \nabla D \rVert_2 - \text{target})` instead. Default: False.
        eps (Tensor, optional): one weight per sample, or per pack. Default: drawn as by ``torch.rand(N, 1, ..., 1)``,
            so that a seed gives the same points as hand-written code.
        generator (torch.Generator, optional): generator of ``eps``. Default: PyTorch's global generator of the device.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, which gives one value per norm. Default: ``"mean"``.
        power (float): exponent, finite and at least 1. Default: 2.
        pack (int): consecutive samples with one score and one norm (PacGAN), a divisor of :math:`N`. Default: 1.
        critic_args (Sequence): further positional arguments of the critic, such as labels. The penalty does not include
            gradients with respect to them. Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - real, fake: :math:`(N, *)`
        - eps: :math:`(N)` or :math:`(N, 1, \ldots, 1)`, with :math:`N / \text{pack}` in place of :math:`N` where
          samples are packed
        - Output: scalar, or :math:`(N / \text{pack})` for ``reduction="none"``

    Returns:
        Tensor: the penalty, in at least float32.

    Raises:
        TypeError: the critic cannot be called or returns no tensor, a tensor is not a dense floating-point tensor, or
            an option is of another type.
        ValueError: the batch is empty, the scores do not depend on it or are fewer than the norms, shapes or devices
            differ, or an option is out of its range.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> real, fake = torch.randn(256, 2), torch.randn(256, 2)
        >>> loss = critic(fake).mean() - critic(real).mean() + 10 * gpkernels.gradient_penalty(critic, real, fake)
        >>> loss.backward()

    References:
        Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, eq. 3. https://arxiv.org/abs/1704.00028

        Lin et al., "PacGAN: The power of two samples in generative adversarial networks", 2018, section 3.
        https://arxiv.org/abs/1712.04086
    """
    options = target, one_sided, reduction, power, pack
    begun = None
    if generator is None:
        found = _BETWEEN.again(critic, options, real, fake, eps, critic_args, critic_kwargs)
        if isinstance(found, Tensor):
            return found
        begun = found
    norm = _norm(target, reduction, one_sided, power)
    check_pair("real", real, "fake", fake)
    check_pack("real", real, pack)
    given = eps_of(real, eps, generator, pack) if begun is None else begun[0][0]
    asked = _Asked(_BETWEEN, options, real, fake)
    wide = promote(real, fake)
    return _penalty(critic, Between(wide[0], wide[1], given), norm, pack, critic_args, critic_kwargs, asked, begun)


class _Asked(NamedTuple):
    """A call of a penalty, to be made once more.

    memory: of its function. options: besides critic and further inputs. real, fake: samples between which the points
    are, or the points themselves and None. make: makes the points of real.
    """

    memory: Memory
    options: tuple[Any, ...]
    real: Tensor
    fake: Tensor | None = None
    make: Callable[[Tensor], Tensor] | None = None

    def keep(self, critic: Critic, further: bool, way: Way) -> None:
        """Keep how it was made. further: whether there were further inputs."""
        place = MADE if self.make is not None else AT_REAL if self.fake is None else BETWEEN
        self.memory.keep(record_of(critic, self.real, self.fake, self.options, further, way, (place,), self.make))


_BETWEEN, _R1, _R2, _DRAGAN, _EIKONAL = (Memory() for _ in range(5))


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
    r"""Compute the squared gradient norm of a critic at real samples.

    .. math::
        \mathbb{E}_{x \sim \text{real}} \lVert \nabla D(x) \rVert_2^2

    This is the paper's regularizer without its factor :math:`\gamma / 2`. Scores of any shape are summed before they
    are differentiated. Differentiable once with respect to all that the critic computes with, its weights above all,
    and to any order inside :func:`fast_double_backward`. The samples are detached.

    Args:
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with the scores
            first.
        real (Tensor): real samples.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, which gives one value per norm. Default: ``"mean"``.
        pack (int): consecutive samples with one score and one norm (PacGAN), a divisor of :math:`N`. Default: 1.
        critic_args (Sequence): further positional arguments of the critic, such as labels. The penalty does not include
            gradients with respect to them. Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - real: :math:`(N, *)`
        - Output: scalar, or :math:`(N / \text{pack})` for ``reduction="none"``

    Returns:
        Tensor: the penalty, in at least float32.

    Raises:
        TypeError: the critic cannot be called or returns no tensor, ``real`` is not a dense floating-point tensor, or
            an option is of another type.
        ValueError: the batch is empty, the scores do not depend on it or are fewer than the norms, or an option is out
            of its range.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> gamma, real = 10.0, torch.randn(16, 1, 8, 8)
        >>> (gamma / 2 * gpkernels.r1_penalty(critic, real)).backward()

    References:
        Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018, eq. 9. https://arxiv.org/abs/1801.04406

        Lin et al., "PacGAN: The power of two samples in generative adversarial networks", 2018, section 3.
        https://arxiv.org/abs/1712.04086
    """
    return _at_samples(_R1, "real", critic, real, reduction, pack, critic_args, critic_kwargs)


def r2_penalty(
    critic: Critic,
    fake: Tensor,
    *,
    reduction: str = "mean",
    pack: int = 1,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Kwargs | None = None,
) -> Tensor:
    r"""Compute the squared gradient norm of a critic at generated samples.

    .. math::
        \mathbb{E}_{x \sim \text{fake}} \lVert \nabla D(x) \rVert_2^2

    This is the paper's regularizer without its factor :math:`\gamma / 2`. Scores of any shape are summed before they
    are differentiated. Differentiable once with respect to all that the critic computes with, its weights above all,
    and to any order inside :func:`fast_double_backward`. The samples are detached.

    Args:
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with the scores
            first.
        fake (Tensor): generated samples.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, which gives one value per norm. Default: ``"mean"``.
        pack (int): consecutive samples with one score and one norm (PacGAN), a divisor of :math:`N`. Default: 1.
        critic_args (Sequence): further positional arguments of the critic, such as labels. The penalty does not include
            gradients with respect to them. Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - fake: :math:`(N, *)`
        - Output: scalar, or :math:`(N / \text{pack})` for ``reduction="none"``

    Returns:
        Tensor: the penalty, in at least float32.

    Raises:
        TypeError: the critic cannot be called or returns no tensor, ``fake`` is not a dense floating-point tensor, or
            an option is of another type.
        ValueError: the batch is empty, the scores do not depend on it or are fewer than the norms, or an option is out
            of its range.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> weights = torch.rand(16)  # one per sample
        >>> penalty = gpkernels.r2_penalty(critic, torch.randn(16, 1, 8, 8), reduction="none")
        >>> (weights * penalty).sum().backward()

    References:
        Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018, eq. 10. https://arxiv.org/abs/1801.04406

        Lin et al., "PacGAN: The power of two samples in generative adversarial networks", 2018, section 3.
        https://arxiv.org/abs/1712.04086
    """
    return _at_samples(_R2, "fake", critic, fake, reduction, pack, critic_args, critic_kwargs)


def _at_samples(
    memory: Memory,
    called: str,
    critic: Critic,
    x: Tensor,
    reduction: str,
    pack: int,
    args: Sequence[Any],
    kwargs: Kwargs | None,
) -> Tensor:
    """Compute R1 or R2. called: name of the samples."""
    options = reduction, pack
    found = memory.again(critic, options, x, args=args, kwargs=kwargs)
    if isinstance(found, Tensor):
        return found
    check_batch(called, x)
    check_pack(called, x, pack)
    asked = _Asked(memory, options, x)
    return _penalty(critic, x, _norm(0.0, reduction), pack, args, kwargs, asked, found)


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
    r"""Compute the penalty on a critic's gradient norms around real samples, as in DRAGAN.

    .. math::
        \mathbb{E} \bigl( \lVert \nabla D(\hat{x}) \rVert_2 - \text{target} \bigr)^2, \qquad
        \hat{x} = \text{real} + \text{scale} \cdot \operatorname{std}(\text{real}) \, u, \quad u \sim U[0, 1)

    Each element has its own :math:`u`; the standard deviation is that of the whole batch, with Bessel's correction.
    Scores of any shape are summed before they are differentiated. Where :math:`\nabla D = 0` the subgradient is 0.
    Differentiable once with respect to all that the critic computes with, its weights above all, and to any order
    inside :func:`fast_double_backward`. The samples are detached.

    Args:
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with the scores
            first.
        real (Tensor): real samples, of at least two elements in all.
        target (float): norm that is not penalised, finite and at least 0. Default: 1.
        scale (float): largest distance from the samples, in standard deviations, finite and at least 0. Default: 0.5.
        generator (torch.Generator, optional): generator of the noise. Default: PyTorch's global generator of the
            device.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, which gives one value per norm. Default: ``"mean"``.
        pack (int): consecutive samples with one score and one norm (PacGAN), a divisor of :math:`N`. Default: 1.
        critic_args (Sequence): further positional arguments of the critic, such as labels. The penalty does not include
            gradients with respect to them. Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - real: :math:`(N, *)`
        - Output: scalar, or :math:`(N / \text{pack})` for ``reduction="none"``

    Returns:
        Tensor: the penalty, in at least float32.

    Raises:
        TypeError: the critic cannot be called or returns no tensor, ``real`` is not a dense floating-point tensor, or
            an option is of another type.
        ValueError: the batch is empty, the scores do not depend on it or are fewer than the norms, or an option is out
            of its range.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> gpkernels.dragan_penalty(critic, torch.randn(16, 1, 8, 8)).backward()

    References:
        Kodali et al., "On Convergence and Stability of GANs", 2017, Algorithm 1. https://arxiv.org/abs/1705.07215

        Lin et al., "PacGAN: The power of two samples in generative adversarial networks", 2018, section 3.
        https://arxiv.org/abs/1712.04086
    """
    options = target, scale, reduction, pack
    found = None
    if generator is None:
        found = _DRAGAN.again(critic, options, real, args=critic_args, kwargs=critic_kwargs)
        if isinstance(found, Tensor):
            return found
    check_batch("real", real)
    norm = _norm(target, reduction)
    check_pack("real", real, pack)
    points = dragan_points(real, scale, generator) if found is None else found[0][0]
    asked = _Asked(_DRAGAN, options, real, make=partial(dragan_points, scale=scale))
    return _penalty(critic, points, norm, pack, critic_args, critic_kwargs, asked, found)


def eikonal_loss(
    field: Critic,
    points: Tensor,
    *,
    reduction: str = "mean",
    power: float = 2.0,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Kwargs | None = None,
) -> Tensor:
    r"""Compute the eikonal term of a signed distance field.

    .. math::
        \mathbb{E} \bigl| \lVert \nabla f(x) \rVert_2 - 1 \bigr|^{\text{power}}

    A power of 1 gives SIREN's term. Where :math:`\nabla f = 0` the subgradient is 0. Differentiable once with respect
    to all that the field computes with, its weights above all, and to any order inside :func:`fast_double_backward`.
    The points are detached. For losses of the gradient itself, such as its difference from normals, see
    :func:`input_gradient`.

    Args:
        field (Callable): a module or any other callable that maps points to distances, or to a tuple with the distances
            first.
        points (Tensor): the points; the norm is over the coordinates of each.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, which gives one value per point. Default: ``"mean"``.
        power (float): exponent, finite and at least 1. Default: 2.
        critic_args (Sequence): further positional arguments of the field, such as latent codes. The loss does not
            include gradients with respect to them. Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - points: :math:`(*, d)`
        - Output: scalar, or :math:`(*)` for ``reduction="none"``

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: the field cannot be called or returns no tensor, ``points`` is not a dense floating-point tensor, or
            an option is of another type.
        ValueError: there are no points, the distances do not depend on them, or an option is out of its range.

    Example:
        >>> field = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Softplus(100), torch.nn.Linear(64, 1))
        >>> (0.1 * gpkernels.eikonal_loss(field, torch.randn(1024, 3))).backward()

    References:
        Gropp et al., "Implicit Geometric Regularization for Learning Shapes", 2020, eq. 2. https://arxiv.org/abs/2002.10099

        Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions", 2020, eq. 6.
        https://arxiv.org/abs/2006.09661
    """
    options = reduction, power
    found = _EIKONAL.again(field, options, points, args=critic_args, kwargs=critic_kwargs)
    if isinstance(found, Tensor):
        return found
    check_batch("points", points)
    norm = _norm(1.0, reduction, power=power)
    asked = _Asked(_EIKONAL, options, points)
    return _penalty(field, points, norm, 0, critic_args, critic_kwargs, asked, found)


def dragan_points(real: Tensor, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """Return real + scale * std(real) * U[0, 1) per element, the points at which DRAGAN penalises."""
    check_batch("real", real)
    if real.numel() < 2:
        raise ValueError(f"real: expected at least two elements, to have a spread, got shape {tuple(real.shape)}")
    scale = check_nonnegative("scale", scale)
    real = real.detach()
    spread = real.to(torch.promote_types(real.dtype, torch.float32)).std().reshape(1)
    if is_compiling():  # an op is compiled anew for every number
        scale, spread = 1.0, spread * scale
    points: Tensor = instance_noise_op(real, scale, spread, draw_key(real.device, generator), False)
    return points


def eps_of(real: Tensor, eps: Tensor | None, generator: torch.Generator | None, pack: int) -> Tensor:
    """Return one eps per sample, as given or drawn; the samples of a pack share one."""
    packs = real if pack == 1 else real[::pack]
    if eps is None:
        eps = draw_eps(packs, generator)
    else:
        check_eps(eps, packs)
    return eps if pack == 1 else eps.repeat_interleave(pack, 0)


def _norm(target: float, reduction: str, one_sided: bool = False, power: float = 2.0) -> Norm:
    return Norm(
        check_nonnegative("target", target),
        check_flag("one_sided", one_sided),
        check_power(power),
        check_reduction(reduction),
    )


def _penalty(
    critic: Critic,
    points: Tensor | Between,
    norm: Norm,
    pack: int,
    args: Sequence[Any],
    kwargs: Kwargs | None,
    asked: _Asked,
    begun: Any = None,
) -> Tensor:
    """Compute the penalty at the points, by PyTorch's own operations where more derivatives may follow.

    begun: as ``Memory.again`` returned it.
    """
    check_callable(called(pack), critic)
    check_further(args, kwargs)
    if norm.reduction == REDUCTIONS["none"] or transformed() or (depth() and not is_compiling()):
        return _of_gradient(critic, points, norm, pack, args, kwargs)
    task = (_task.__wrapped__ if is_compiling() else _task)(norm, torch.is_grad_enabled(), pack)

    keep = partial(asked.keep, critic, len(args) > 0 or bool(kwargs))
    rest = None if begun is None else Begun(False, *begun[1:])
    own = partial(penalty_on_gradient, critic, points, task, args, kwargs, rest, keep)
    eagerly = partial(with_gathered, own)
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
    """Compute the penalty from the gradient as a value."""
    warn_of_batch_norm(critic)
    x = points_of(points).detach()
    output, gradient = gradient_of(critic, x, args, kwargs, called(pack))
    check_scores(scores_of(output, called(pack)), x, pack)
    return norm.of(gradient, pack)


def warn_of_batch_norm(critic: Critic, stacklevel: int = 4) -> None:
    """Warn once about a critic with BatchNorm in training mode."""
    if not isinstance(critic, nn.Module) or critic in (seen := _looked_at[critic.training]) or transformed():
        return
    seen.add(critic)
    for module in critic.modules():
        if isinstance(module, BatchNorm) and module.training:
            warnings.warn(
                "the critic has BatchNorm in training mode, which mixes samples: the penalty is not per sample; "
                "LayerNorm, GroupNorm and InstanceNorm keep samples apart",
                stacklevel=stacklevel,
            )
            return
