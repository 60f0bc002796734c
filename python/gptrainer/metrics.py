"""How good samples are, and how steep the critic is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor, nn

import gpkernels
from gptrainer.classifier import Classifier, train_classifier
from gptrainer.data import RING_SIGMA, eight_gaussians, load_digits, ring_centres
from gptrainer.models import sample

Array = NDArray[np.float64]
SAMPLES = 2000


class Quality(Protocol):
    """Measures a generator on the same latent points each time."""

    name: str
    """The measure in the first place, a key of what ``measure`` returns."""
    facts: dict[str, float]
    """What a reader needs to judge the measure by."""

    def measure(self, generator: nn.Module) -> dict[str, float]: ...


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of features."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Of the rows of (N, d)."""
        return cls(features.mean(axis=0), np.cov(features, rowvar=False))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6)."""
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric: no complex rounding errors.
    values, vectors = linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    offset = a.mean - b.mean
    distance = offset @ offset + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


class DigitsQuality:
    """Fréchet distance to the digits, in the features of a classifier that was trained on them."""

    name = "frechet_distance"

    def __init__(self, latent: int, seed: int, device: torch.device) -> None:
        digits = load_digits()
        self.classifier: Classifier = train_classifier(digits, seed)
        self.latent = _latent_points(latent, seed).to(device)
        features = self.classifier.features(digits.images)
        self.real = Moments.of(features)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        halves = [Moments.of(features[half.numpy()]) for half in order.chunk(2)]
        self.facts = {
            "classifier_held_out_accuracy": self.classifier.accuracy,
            "frechet_distance_of_real_halves": frechet_distance(*halves),
        }

    def measure(self, generator: nn.Module) -> dict[str, float]:
        features = self.classifier.features(sample(generator, self.latent).cpu())
        return {self.name: frechet_distance(Moments.of(features), self.real)}


class RingQuality:
    """Share of samples within 4 sigma of a mode, and how many modes hold at least 20 of 2,500 samples."""

    name = "share_within_4_sigma"

    def __init__(self, latent: int, seed: int, device: torch.device) -> None:
        self.latent = _latent_points(latent, seed, 2500).to(device)
        real = eight_gaussians(2500, torch.Generator().manual_seed(seed))
        self.facts = {"share_of_real_within_4_sigma": mode_coverage(real)[0]}

    def measure(self, generator: nn.Module) -> dict[str, float]:
        share, modes = mode_coverage(sample(generator, self.latent).cpu())
        return {self.name: share, "modes_covered": modes}


def mode_coverage(points: Tensor, least: float = 20 / 2500) -> tuple[float, int]:
    """(share of points within 4 sigma of a mode, number of modes that hold at least a share ``least``)."""
    near = torch.cdist(points, ring_centres()) < 4 * RING_SIGMA
    return near.any(dim=1).double().mean().item(), int((near.double().mean(dim=0) >= least).sum())


def mean_gradient_norm(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> float:
    """E |grad D| at points between real and fake."""
    eps = torch.rand(len(real), generator=generator).to(real)
    points = gpkernels.interpolate(real, fake, eps).requires_grad_()
    (grad,) = torch.autograd.grad(critic(points).sum(), points)
    return grad.flatten(1).norm(dim=1).mean().item()


def build_quality(data: str, latent: int, seed: int, device: torch.device) -> Quality:
    """The measure of a data set, by its name."""
    return DigitsQuality(latent, seed, device) if data == "digits" else RingQuality(latent, seed, device)


def _latent_points(latent: int, seed: int, n: int = SAMPLES) -> Tensor:
    return torch.randn(n, latent, generator=torch.Generator().manual_seed(seed))
