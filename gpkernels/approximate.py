"""R1 without a gradient of a gradient, for critics that have none: how the score changes under a little noise.

It is an estimate, with a bias and a spread; ``r1_penalty`` is exact and, for most critics, cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.call import scores_of
from gpkernels.ops.checks import check_batch, check_number
from gpkernels.ops.gradient_norm_penalty import check_reduction
from gpkernels.ops.instance_noise import add_instance_noise
from gpkernels.ops.tensors import rows_of


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
    """E (D(x) - D(x + sigma * N(0, 1)))^2 / sigma^2 at real data, an estimate of ``r1_penalty`` (Lin et al. 2025).

    For a critic that is linear over a distance of sigma its expectation is E |grad D(x)|^2; a sample's own estimate has
    a standard deviation of sqrt(2) times its value. The critic is called twice, on ``real`` and on noisy data, and both
    calls are differentiated with respect to the weights once. That needs no second derivative, so it also takes what
    has none, such as fused attention. Whatever else differs between the two calls counts as if the noise had done it:
    dropout has to be off, and samples must not meet. Differences are taken in at least float32, but a score that comes
    in bfloat16 is rounded before that; ``gpkernels explain --approximate`` measures what follows.

    The paper's loss, lambda * (D(x) - D(x + sigma * N(0, 1)))^2 with lambda = 100 and sigma = 0.01, is not divided by
    sigma^2. Here its coefficient is lambda * sigma^2, 0.01 for these; R1's gamma / 2 is the coefficient as it is.

    real: (N, *), detached. sigma: above 0, in units of the data. generator: draws the noise, as in
    ``add_instance_noise``. reduction: "mean", "sum" or "none", which gives (N,). critic_args, critic_kwargs: further
    inputs, such as labels, passed after x in both calls. Maps of scores are summed over each sample. Raises TypeError
    or ValueError for bad input.
    """
    if not callable(critic):
        raise TypeError(f"critic: expected a module or a callable, got {type(critic).__name__}")
    check_batch("real", real)
    sigma = check_number("sigma", sigma)
    if not 0 < sigma < math.inf:  # nor NaN
        raise ValueError(f"sigma: expected a finite number above 0, got {sigma}")
    check_reduction(reduction)
    real, kwargs = real.detach(), critic_kwargs or {}
    noisy = add_instance_noise(real, sigma, generator=generator)
    clean, moved = (_summed(scores_of(critic(x, *critic_args, **kwargs)), x) for x in (real, noisy))
    squares = ((moved - clean) / sigma).square()
    if reduction == "none":
        return squares
    return squares.mean() if reduction == "mean" else squares.sum()


def _summed(scores: Tensor, x: Tensor) -> Tensor:
    """One score per sample, (N,), in at least float32."""
    n = x.shape[0]
    if scores.shape[:1] != (n,) and scores.numel() != n:
        raise ValueError(f"critic: expected a score for each of {n} samples, got shape {tuple(scores.shape)}")
    return rows_of(scores.reshape(n, -1)).sum(1)
