"""The networks of semi-supervised CT-GAN for MNIST (Wei et al. 2018): noise on every layer, weights normalised."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gptrainer.data import DataSet
from gptrainer.models.layers import FeatureCritic, GaussianNoise, Pair, Uniform, to_range

INPUT_SIGMA, HIDDEN_SIGMA = 0.3, 0.5
BATCH_NORM_EPS = 1e-6


class Classifier(FeatureCritic):
    """Logits of the classes; "fake" is a further class of logit 0. Features: the last hidden layer."""

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (scores, features) in one pass; the features, matched by the generator, are those before noise."""
        features = cast(Tensor, self[:-2](x))
        return self[-2:](features), features

    def initialise(self, images: Tensor) -> None:
        """Scale each layer to outputs of mean 0 and variance 1 on these images (Salimans & Kingma 2016)."""
        x = images
        with torch.no_grad():
            for layer in self:
                x = layer(x)
                if isinstance(layer, nn.Linear):
                    mean, spread = x.mean(dim=0), x.std(dim=0, correction=0)
                    layer.parametrizations.weight.original0 /= spread[:, None]  # type: ignore[union-attr]
                    layer.bias.copy_((layer.bias - mean) / spread)
                    x = (x - mean) / spread


def build(data: DataSet, latent: int, width: int, batch_norm: bool) -> Pair:
    """Build (generator, classifier). width: of the narrowest hidden layers, 250 in the code."""
    pixels = math.prod(data.shape)
    layers: list[nn.Module] = [Uniform()]
    for fan_in in (latent, 2 * width):
        hidden = nn.Linear(fan_in, 2 * width, bias=False)
        nn.init.xavier_uniform_(hidden.weight)
        norm = nn.BatchNorm1d(2 * width, eps=BATCH_NORM_EPS)
        norm.weight.requires_grad_(False)  # a shift, and no scale
        layers += [hidden, norm, nn.Softplus()]
    layers += [_normalised(2 * width, pixels, train_scale=True), to_range(data), nn.Unflatten(1, data.shape)]
    generator = nn.Sequential(*layers)
    layers = [nn.Flatten(), GaussianNoise(INPUT_SIGMA)]
    for fan_in, fan_out in pairwise([pixels, 4 * width, 2 * width, width, width, width]):
        layers += [_normalised(fan_in, fan_out, train_scale=False), nn.ReLU(), GaussianNoise(HIDDEN_SIGMA)]
    return generator, Classifier(*layers, _normalised(width, data.classes, train_scale=True))


def _normalised(fan_in: int, fan_out: int, *, train_scale: bool) -> nn.Module:
    """Linear layer w = scale v / |v| for each output, with scale 1, v from N(0, .1) and bias 0."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.normal_(layer.weight, 0.0, 0.1)
    nn.init.zeros_(layer.bias)
    layer = parametrizations.weight_norm(layer, dim=0)
    scale = layer.parametrizations.weight.original0
    nn.init.ones_(scale)
    scale.requires_grad_(train_scale)
    return layer
