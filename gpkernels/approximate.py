"""Estimate of R1 without a second derivative, for critics that have none, from the change of scores under noise.

The estimate has a bias and a spread; ``r1_penalty`` is exact and, for most critics, cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.call import scores_of
from gpkernels.ops.checks import check_batch, check_callable, check_further, check_number
from gpkernels.ops.gradient_norm_penalty import check_reduction, gradient_norm_penalty
from gpkernels.ops.instance_noise import instance_noise_op
from gpkernels.ops.philox import draw_key
from gpkernels.ops.tensors import accumulation_dtype


def approximate_r1_penalty(
    critic: Callable[..., Any],
    real: Tensor,
    sigma: float = 0.01,
    *,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    r"""Estimate the R1 penalty of a critic from two calls, on real samples and on noisy ones.

    .. math::
        \mathbb{E} \left( \frac{D(x + \sigma \xi) - D(x)}{\sigma} \right)^2, \qquad \xi \sim \mathcal{N}(0, 1)

    For a critic that is linear over a distance of :math:`\sigma` its expectation is that of :func:`r1_penalty`; the
    estimate for one sample has a standard deviation of :math:`\sqrt{2}` times its value. Both calls are differentiated
    with respect to the weights once, so critics without a second derivative can be used, such as those with fused
    attention. Any other difference between the two calls counts as an effect of the noise: disable dropout, and avoid
    critics in which samples interact. Differences are computed in at least float32, but a score in bfloat16 is rounded
    before; ``gpkernels explain --approximate`` measures the effect.

    The paper's loss, with weight :math:`\lambda = 100` and :math:`\sigma = 0.01`, is not divided by :math:`\sigma^2`.
    Here its coefficient is :math:`\lambda \sigma^2 = 0.01`; that of R1, :math:`\gamma / 2`, is unchanged.
    Differentiable to any order that the critic supports. ``real`` is detached.

    Args:
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with the scores
            first. Maps of scores are summed over each sample.
        real (Tensor): real samples.
        sigma (float): standard deviation of the noise, finite and above 0. Default: 0.01.
        generator (torch.Generator, optional): generator of the noise. Default: PyTorch's global generator of the
            device.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, which gives one value per sample. Default: ``"mean"``.
        critic_args (Sequence): further positional arguments of the critic in both calls, such as labels. Default: none.
        critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.

    Shape:
        - real: :math:`(N, *)`
        - Output: scalar, or :math:`(N)` for ``reduction="none"``

    Returns:
        Tensor: the estimate, in at least float32.

    Raises:
        TypeError: the critic cannot be called or returns no tensor, ``real`` is not a dense floating-point tensor, or
            an option is of another type.
        ValueError: the batch is empty, the scores are not those of each sample, or an option is out of its range.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> gamma, real = 10.0, torch.randn(16, 1, 8, 8)
        >>> (gamma / 2 * gpkernels.approximate_r1_penalty(critic, real)).backward()

    References:
        Lin et al., "Diffusion Adversarial Post-Training for One-Step Video Generation", 2025.
        https://arxiv.org/abs/2501.08316
    """
    check_callable("critic", critic)
    check_batch("real", real)
    sigma = check_number("sigma", sigma)
    if not 0 < sigma < math.inf:  # nor NaN
        raise ValueError(f"sigma: expected a finite number above 0, got {sigma}")
    check_reduction(reduction)
    check_further(critic_args, critic_kwargs)
    real = real.detach()
    noisy: Tensor = instance_noise_op(real, sigma, None, draw_key(real.device, generator), True)
    kwargs = critic_kwargs or {}
    clean = _summed(critic(real, *critic_args, **kwargs), real)
    moved = _summed(critic(noisy, *critic_args, **kwargs), real)
    return gradient_norm_penalty((moved - clean) / sigma, 0.0, reduction=reduction)  # of slopes along the noise


def _summed(output: Any, x: Tensor) -> Tensor:
    """Return a score for each sample, (N,) or (N, 1), in at least float32."""
    scores = scores_of(output)
    n, shape = x.shape[0], scores.shape
    wide = accumulation_dtype(scores.dtype)
    if scores.dtype != wide:
        scores = scores.to(wide)
    if shape == (n, 1) or shape == (n,):
        return scores
    if shape[:1] != (n,) and scores.numel() != n:
        raise ValueError(f"critic: expected a score for each of {n} samples, got shape {tuple(shape)}")
    return scores.reshape(n, -1).sum(1)
