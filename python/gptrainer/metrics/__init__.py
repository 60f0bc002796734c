"""Measures of sample quality, and the norms of the critic's gradient."""

from __future__ import annotations

from pathlib import Path

import torch

from gptrainer.data import DATASETS
from gptrainer.metrics.classifier import Classifier, train_classifier
from gptrainer.metrics.distances import (
    Moments,
    frechet_distance,
    gradient_norms,
    inception_score,
    mean_gradient_norm,
    mode_coverage,
    wasserstein_1,
)
from gptrainer.metrics.quality import ImageQuality, PointsQuality

__all__ = [
    "Classifier", "ImageQuality", "Moments", "PointsQuality", "build_quality", "frechet_distance",
    "gradient_norms", "inception_score", "mean_gradient_norm", "mode_coverage", "train_classifier", "wasserstein_1",
]  # fmt: skip


def build_quality(
    data: str, latent: int, seed: int, device: torch.device, *, data_dir: Path | None = None
) -> ImageQuality | PointsQuality:
    """Build the measure of a data set. The classifier of images is trained once and then cached."""
    if DATASETS[data].kind == "images":
        return ImageQuality(data, latent, seed, device, data_dir)
    return PointsQuality(data, latent, seed, device)
