"""The networks of a run: those of its data set, with what its system asks of a critic.

A critic for the consistency term has ``with_features(x) -> (scores, features)`` beside its call, which gives scores
alone, and dropout between. A semi-supervised critic is a classifier: its call gives logits (N, classes), and
``with_features(x) -> (logits, features)``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gptrainer.config import TrainConfig, filled
from gptrainer.models import build_models


@runtime_checkable
class GivesFeatures(Protocol):
    """A critic or classifier that shows its last hidden layer."""

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, *). Gives scores (N, 1) or logits (N, classes), and features (N, d)."""
        ...


def build_networks(config: TrainConfig) -> tuple[nn.Module, nn.Module]:
    """(generator, critic) of a run, initialised from torch's global generator."""
    generator, critic = build_models(config.data, filled(config.latent), filled(config.width))
    if config.algorithm == "ct-gan":
        return generator, with_dropout(critic, filled(config.dropout))
    if config.algorithm == "ssl-ct-gan":
        return generator, noisy_classifier(64, filled(config.width), 10)
    return generator, critic


class FeatureCritic(nn.Module):
    """A body that gives features, and a head that gives scores or logits."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x))
        return scores

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features


def with_dropout(critic: nn.Sequential, p: float) -> FeatureCritic:
    """The same layers with dropout after each activation, as CT-GAN's critics have it."""
    *body, head = critic
    layers: list[nn.Module] = []
    for layer in body:
        layers += [layer, nn.Dropout(p)] if isinstance(layer, (nn.ReLU, nn.LeakyReLU)) else [layer]
    return FeatureCritic(nn.Sequential(*layers), head)


class GaussianNoise(nn.Module):
    """x + sigma N(0, 1) in training."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x) if self.training else x


def noisy_classifier(pixels: int, width: int, classes: int) -> FeatureCritic:
    """CT-GAN's classifier for digits: noise of .3 on the pixels and .5 on each hidden layer."""
    sizes = [pixels, width, width // 2, width // 4]
    layers: list[nn.Module] = [nn.Flatten(), GaussianNoise(0.3)]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), GaussianNoise(0.5)]
    return FeatureCritic(nn.Sequential(*layers[:-1]), nn.Sequential(GaussianNoise(0.5), nn.Linear(sizes[-1], classes)))
