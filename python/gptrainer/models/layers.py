"""Layers and initialisation that several networks share."""

from __future__ import annotations

import math
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptrainer.data import DataSet

Pair = tuple[nn.Module, nn.Module]  # a generator and a critic
Convolution = TypeVar("Convolution", bound=nn.Conv2d | nn.ConvTranspose2d)
CT_DROPOUT = 0.5  # after each activation, except in residual networks


class FeatureCritic(nn.Sequential):
    """A critic whose last layer is its head; the features are the head's input."""

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (scores, features) in one pass."""
        features = cast(Tensor, self[:-1](x))
        return self[-1](features), features


class SameConv2d(nn.Conv2d):
    """TensorFlow's padding "SAME": outputs of ceil(size / stride), the odd pixel of padding below and to the right."""

    def forward(self, input: Tensor) -> Tensor:
        sizes = zip(input.shape[2:], self.kernel_size, self.stride, strict=True)
        total = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n, kernel, stride in sizes]
        (up, down), (left, right) = ((n // 2, n - n // 2) for n in total)
        if (up, left) == (down, right):
            return F.conv2d(input, self.weight, self.bias, self.stride, (up, left))
        return super().forward(F.pad(input, (left, right, up, down)))


class Doubling(nn.ConvTranspose2d):
    """The transpose of such a convolution with a 5x5 kernel and stride 2: outputs of twice the size."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        height, width = input.shape[2:]
        return super().forward(input)[:, :, 1 : 1 + 2 * height, 1 : 1 + 2 * width]


class GaussianNoise(nn.Module):
    """Additive noise in training."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn(x.shape, device=x.device, dtype=x.dtype) if self.training else x


class Uniform(nn.Module):
    """Normal noise as uniform noise in (0, 1), by its distribution function."""

    def forward(self, latent: Tensor) -> Tensor:
        return torch.special.ndtr(latent)


def to_range(data: DataSet) -> nn.Module:
    """Output activation for the range of a data set's pixels."""
    return nn.Sigmoid() if data.scaling.low == 0 else nn.Tanh()


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Linear layer, Glorot-uniform, with bias 0."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def convolution(channels: int, out: int, kernel: int, stride: int = 1, *, he: bool = True) -> SameConv2d:
    """Convolution initialised as in the WGAN-GP code, with a fan-out of 1 / stride^2 of the kernel."""
    return _uniform(SameConv2d(channels, out, kernel, stride), channels * kernel**2, out * kernel**2 / stride**2, he)


def transposed(channels: int, out: int) -> Doubling:
    """Transposed convolution initialised as in the WGAN-GP code, with a fan-in of 1/4 of the kernel."""
    return _uniform(Doubling(channels, out, 5, 2), channels * 25 / 4, out * 25)


def _uniform(layer: Convolution, fan_in: float, fan_out: float, he: bool = True) -> Convolution:
    """Initialise with variance 4 / (fan_in + fan_out), or half of that (Glorot), and bias 0."""
    bound = math.sqrt(3 * (4 if he else 2) / (fan_in + fan_out))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer
