"""Measures of a generator in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptrainer.data import DATASETS, MIXTURES, POINTS, load_images
from gptrainer.metrics.classifier import classifier_of
from gptrainer.metrics.distances import frechet_distance, inception_score, mode_coverage, moments, wasserstein_1
from gptrainer.models import sample

IMAGES = 2000
REAL_IMAGES = 10_000
POINTS_COUNTED = 2500
POINTS_TRANSPORTED = 1000


class ImageQuality:
    """Fréchet distance and Inception score in the features of a classifier that was trained on the data.

    The distance is to the test images, or to the training images where there are none. Without labels the classifier
    predicts the rotation of an image, and there is no score.
    """

    name = "frechet_distance"

    def __init__(self, data: str, latent: int, seed: int, device: torch.device, data_dir: Path | None = None) -> None:
        train = load_images(data, data_dir=data_dir)
        self.classifier = classifier_of(data, train)
        self.labelled = train.labels is not None
        self.latent = torch.randn(IMAGES, latent, generator=torch.Generator().manual_seed(seed)).to(device)
        real = load_images(data, data_dir=data_dir, split="held-out") if DATASETS[data].tested else train
        features = self.classifier.features(real[torch.arange(min(REAL_IMAGES, len(real)))])
        self.real = moments(features)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        halves = [moments(features[half.numpy()]) for half in order.chunk(2)]
        self.facts = {
            "classifier_held_out_accuracy": self.classifier.accuracy.item(),
            "frechet_distance_of_real_halves": frechet_distance(*halves),
            "images_in_a_real_half": len(features) // 2,
            **self._score(features, "inception_score_of_real_images"),
        }

    def measure(self, generator: nn.Module) -> dict[str, float]:
        return self.measure_images(sample(generator, self.latent).cpu())

    def measure_images(self, images: Tensor) -> dict[str, float]:
        """Measure images, (N, C, H, W), in the range of the data."""
        features = self.classifier.features(images)
        distance = frechet_distance(moments(features), self.real)
        return {self.name: distance, **self._score(features, "inception_score")}

    def _score(self, features: NDArray[np.float64], name: str) -> dict[str, float]:
        return {name: inception_score(self.classifier.scores(features))} if self.labelled else {}


class PointsQuality:
    """Exact Wasserstein distance; for mixtures also the share of samples within 4 sigma of a mode, and modes covered.

    A mode is covered if it has at least 20 of 2,500 samples.
    """

    def __init__(self, data: str, latent: int, seed: int, device: torch.device) -> None:
        self.mixture = MIXTURES.get(data)
        self.name = "wasserstein_1" if self.mixture is None else "share_within_4_sigma"
        self.latent = torch.randn(POINTS_COUNTED, latent, generator=torch.Generator().manual_seed(seed)).to(device)
        real = POINTS[data](POINTS_COUNTED, torch.Generator().manual_seed(seed))
        self.real, other = real[:POINTS_TRANSPORTED], real[POINTS_TRANSPORTED : 2 * POINTS_TRANSPORTED]
        self.facts = {"wasserstein_1_of_real_halves": wasserstein_1(self.real, other)}
        if self.mixture is not None:
            self.facts["share_of_real_within_4_sigma"] = mode_coverage(real, self.mixture)[0]
            self.facts["modes"] = len(self.mixture.centres)

    def measure(self, generator: nn.Module) -> dict[str, float]:
        points = sample(generator, self.latent).cpu()
        distance = {"wasserstein_1": wasserstein_1(points[:POINTS_TRANSPORTED], self.real)}
        if self.mixture is None:
            return distance
        share, modes = mode_coverage(points, self.mixture)
        return {self.name: share, "modes_covered": modes, **distance}


def build_quality(
    data: str, latent: int, seed: int, device: torch.device, *, data_dir: Path | None = None
) -> ImageQuality | PointsQuality:
    """Build the measure of a data set. The classifier of images is trained once and then cached."""
    if DATASETS[data].kind == "images":
        return ImageQuality(data, latent, seed, device, data_dir)
    return PointsQuality(data, latent, seed, device)
