"""Fully connected networks, for points and for small images."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from gptrainer.data import DataSet
from gptrainer.models.layers import FeatureCritic, Pair, to_range


def build(data: DataSet, latent: int, width: int, batch_norm: bool, *, dropout: float = 0.0) -> Pair:
    """Build three hidden layers, for points as in the WGAN-GP code. dropout: after the critic's activations."""
    generator = _generator(data, latent, width)
    if data.kind == "points":
        critic = dense([*data.shape, width, width, width, 1], nn.ReLU(), dropout=dropout)
    else:
        sizes = [math.prod(data.shape), 2 * width, width, 1]
        critic = [nn.Flatten(), *dense(sizes, nn.LeakyReLU(0.2), dropout=dropout)]
    return generator, FeatureCritic(*critic)


def build_deep(data: DataSet, latent: int, width: int, batch_norm: bool) -> Pair:
    """Build a critic of 12 hidden layers, whose gradients vanish or explode under clipping."""
    critic = dense([*data.shape, *[width] * 12, 1], nn.ReLU())
    return _generator(data, latent, width), FeatureCritic(*critic)


def build_unrolled(data: DataSet, latent: int, width: int, batch_norm: bool) -> Pair:
    """Build the networks of the unrolled GAN's code: two hidden tanh layers, orthogonal of gain 1.4, biases 0."""
    (dims,) = data.shape
    generator = nn.Sequential(*orthogonal([latent, width, width, dims], nn.Tanh(), 1.4))
    return generator, FeatureCritic(*orthogonal([dims, width, width, 1], nn.Tanh(), 1.4))


def dense(
    sizes: list[int], activation: nn.Module, *, batch_norm: bool = False, dropout: float = 0.0
) -> list[nn.Module]:
    """Linear layers with activations in between: hidden He-uniform, output Glorot-uniform, biases 0."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), activation]
        layers += [nn.Dropout(dropout)] if dropout else []
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(linear[-1].weight)
    return layers


def orthogonal(sizes: list[int], activation: nn.Module, gain: float) -> list[nn.Module]:
    """Linear layers with activations in between: orthogonal of one gain, biases 0."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation]
    return layers[:-1]


def _generator(data: DataSet, latent: int, width: int) -> nn.Module:
    hidden = [latent, width, width, width]
    if data.kind == "points":
        return nn.Sequential(*dense([*hidden, *data.shape], nn.ReLU()))
    layers = dense([*hidden, math.prod(data.shape)], nn.ReLU(), batch_norm=True)
    return nn.Sequential(*layers, to_range(data), nn.Unflatten(1, data.shape))
