"""Measures of a set of samples, or of two, and of a critic's slope."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gpkernels
from gptrainer.data import Mixture

Array = NDArray[np.float64]
Moments = tuple[Array, Array]
Scores = Callable[[Tensor], Tensor]


def moments(features: Array) -> Moments:
    """Compute the mean, (d,), and the covariance, (d, d), of the rows of (N, d)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6)."""
    from scipy import linalg  # systems and experiments are listed without it

    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric: no complex rounding errors.
    (mean_a, covariance_a), (mean_b, covariance_b) = a, b
    values, vectors = linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    offset = mean_a - mean_b
    distance = offset @ offset + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return max(float(distance), 0.0)


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)), from 1 to the number of classes (Salimans et al. 2016). logits: (N, classes)."""
    given = logits.double().log_softmax(dim=1)
    marginal = given.logsumexp(dim=0) - np.log(len(given))
    return (given.exp() * (given - marginal)).sum(dim=1).mean().exp().item()


def wasserstein_1(a: Tensor, b: Tensor) -> float:
    """Exact Wasserstein-1 distance of two samples, by Euclidean costs. a: (N, d), b: (M, d)."""
    import ot  # a second to import

    costs = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    return float(ot.emd2([], [], costs, numItermax=10**7))


def mode_coverage(points: Tensor, mixture: Mixture, least: float = 20 / 2500) -> tuple[float, int]:
    """Share of points within 4 sigma of a mode, and number of modes with at least a share ``least`` of the points."""
    near = torch.cdist(points, mixture.centres) < 4 * mixture.sigma
    return near.any(dim=1).double().mean().item(), int((near.double().mean(dim=0) >= least).sum())


def gradient_norms(critic: Scores, points: Tensor) -> Tensor:
    """Compute |grad D| at each point, (N,). points: (N, *)."""
    return gpkernels.input_gradient(critic, points).detach().flatten(1).norm(dim=1)


def mean_gradient_norm(critic: Scores, real: Tensor, fake: Tensor, generator: torch.Generator) -> float:
    """Estimate E |grad D| at interpolates of real and fake."""
    eps = torch.rand(len(real), generator=generator).to(real)
    return gradient_norms(critic, gpkernels.interpolate(real, fake, eps)).mean().item()
