"""How good samples are, and how steep the critic is."""

from __future__ import annotations

from pathlib import Path

import torch

from gptrainer.data import DATASETS
from gptrainer.metrics.classifier import Classifier, train_classifier
from gptrainer.metrics.distances import Moments, frechet_distance, inception_score, mode_coverage, wasserstein_1
from gptrainer.metrics.fidelity import inception_network_metrics
from gptrainer.metrics.gradients import (
    gradient_norms,
    layer_gradient_norms,
    mean_gradient_norm,
    share_at_bound,
    weight_histogram,
)
from gptrainer.metrics.quality import ImageQuality, PointsQuality, Quality

__all__ = [
    "Classifier", "ImageQuality", "Moments", "PointsQuality", "Quality", "build_quality", "frechet_distance",
    "gradient_norms", "inception_network_metrics", "inception_score", "layer_gradient_norms", "mean_gradient_norm",
    "mode_coverage", "share_at_bound", "train_classifier", "wasserstein_1", "weight_histogram",
]  # fmt: skip


def build_quality(data: str, latent: int, seed: int, device: torch.device, *, data_dir: Path | None = None) -> Quality:
    """The measure of a data set, by its name. Images want a classifier, which is trained once and then cached."""
    if DATASETS[data].kind == "images":
        return ImageQuality(data, latent, seed, device, data_dir)
    return PointsQuality(data, latent, seed, device)
