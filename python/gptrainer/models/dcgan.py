"""Convolutional networks: those of the WGAN-GP code for 28 and 32 pixels, those of the WGAN code for 64."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from gptrainer.data import DataSet
from gptrainer.models import mlp
from gptrainer.models.layers import FeatureCritic, Pair, convolution, linear, to_range, transposed


def build(data: DataSet, latent: int, width: int, batch_norm: bool, *, dropout: float = 0.0) -> Pair:
    """Build the pair, fully connected below 28 pixels. dropout: after the critic's activations (Wei et al. 2018).

    width: channels next to the images, which double from layer to layer.
    """
    if data.shape[-1] < 28:
        return mlp.build(data, latent, width, batch_norm, dropout=dropout)
    # At 28 pixels the code has BatchNorm in the generator only together with the critic's.
    generator = _generator(data, latent, width, batch_norm or data.shape[-1] != 28)
    return generator, _critic(data, width, batch_norm, dropout)


def build_mlp(data: DataSet, latent: int, width: int, batch_norm: bool) -> Pair:
    """Build a generator of three hidden layers, without BatchNorm and with unbounded output, and DCGAN's critic."""
    sizes = [latent, width, width, width, math.prod(data.shape)]
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    generator = nn.Sequential(*layers[:-1], nn.Unflatten(1, data.shape))
    return generator, _critic(data, max(1, width // 8), batch_norm)


def _generator(data: DataSet, latent: int, width: int, batch_norm: bool) -> nn.Module:
    if data.shape[-1] == 64:
        return _generator_64(data, latent, width)

    def norm(layer: nn.Module) -> list[nn.Module]:
        return [layer] if batch_norm else []

    return nn.Sequential(
        linear(latent, 4 * width * 16),
        *norm(nn.BatchNorm1d(4 * width * 16)),
        nn.ReLU(),
        nn.Unflatten(1, (4 * width, 4, 4)),
        transposed(4 * width, 2 * width),
        *norm(nn.BatchNorm2d(2 * width)),
        nn.ReLU(),
        *([nn.ZeroPad2d((0, -1, 0, -1))] if data.shape[-1] == 28 else []),  # from 8x8 to 7x7
        transposed(2 * width, width),
        *norm(nn.BatchNorm2d(width)),
        nn.ReLU(),
        transposed(width, data.shape[0]),
        to_range(data),
    )


def _critic(data: DataSet, width: int, batch_norm: bool, dropout: float = 0.0) -> FeatureCritic:
    large = data.shape[-1] == 64
    channels = [data.shape[0], *(width * 2**i for i in range(4 if large else 3))]
    layers: list[nn.Module] = []
    for n, m in pairwise(channels):
        layers.append(nn.Conv2d(n, m, 4, 2, 1, bias=False) if large else convolution(n, m, 5, stride=2))
        layers += [nn.BatchNorm2d(m)] if batch_norm and n != data.shape[0] else []
        layers += [nn.LeakyReLU(0.2), *([nn.Dropout(dropout)] if dropout else [])]
    features = channels[-1] * 16
    if not large:
        return FeatureCritic(*layers, nn.Flatten(), linear(features, 1))
    # The code's last layer is a convolution over all of the 4x4 pixels left, which is this one.
    return FeatureCritic(*layers, nn.Flatten(), nn.Linear(features, 1, bias=False)).apply(_init_64)


def _generator_64(data: DataSet, latent: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (latent, 1, 1)), nn.ConvTranspose2d(latent, 8 * width, 4, bias=False)]
    for n, m in pairwise([8 * width, 4 * width, 2 * width, width, data.shape[0]]):
        layers += [nn.BatchNorm2d(n), nn.ReLU(), nn.ConvTranspose2d(n, m, 4, 2, 1, bias=False)]
    return nn.Sequential(*layers, to_range(data)).apply(_init_64)


def _init_64(layer: nn.Module) -> None:
    """Initialise convolutions by N(0, .02), BatchNorm's scale by N(1, .02) and its shift by 0."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)
