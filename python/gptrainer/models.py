"""Generators and critics. No critic has BatchNorm: it would mix samples, and the penalty is one per sample."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def build_models(data: str, latent: int, width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(generator, critic) for a data set, by its name, initialised from torch's global generator."""
    return digits_models(latent, width) if data == "digits" else toy_models(latent, width)


def digits_models(latent: int, width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Fully connected networks for 8x8 images in [0, 1], where convolutions cost more than they gain."""
    generator = nn.Sequential(
        *dense([latent, width, width, width, 64], nn.ReLU(), batch_norm=True), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))
    )
    critic = nn.Sequential(nn.Flatten(), *dense([64, 2 * width, width, 1], nn.LeakyReLU(0.2)))
    return generator, critic


def toy_models(latent: int, width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """WGAN-GP's networks for points in the plane: three hidden layers of ReLUs."""
    generator = nn.Sequential(*dense([latent, width, width, width, 2], nn.ReLU()))
    critic = nn.Sequential(*dense([2, width, width, width, 1], nn.ReLU()))
    return generator, critic


def dense(sizes: list[int], activation: nn.Module, *, batch_norm: bool = False) -> list[nn.Module]:
    """Linear layers with an activation between them: hidden He-uniform, output Glorot-uniform, biases 0."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), activation]
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(linear[-1].weight)
    return layers


def sample(generator: nn.Module, latent: Tensor, chunk: int = 1024) -> Tensor:
    """Generated samples in evaluation mode, without a graph, in chunks that keep memory small."""
    training = generator.training
    generator.eval()
    with torch.no_grad():
        samples = torch.cat([generator(part) for part in latent.split(chunk)])
    generator.train(training)
    return samples
