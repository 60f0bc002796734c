"""Layers and initialisation that several networks share."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptrainer.data import DataSet

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
        height, width = (_padding(*args) for args in zip(input.shape[2:], self.kernel_size, self.stride, strict=True))
        if height[0] == height[1] and width[0] == width[1]:
            return F.conv2d(input, self.weight, self.bias, self.stride, (height[0], width[0]))
        return F.conv2d(F.pad(input, (*width, *height)), self.weight, self.bias, self.stride)


class SameConvTranspose2d(nn.ConvTranspose2d):
    """The transpose of such a convolution: outputs of size * stride."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        full = F.conv_transpose2d(input, self.weight, None, self.stride)
        height, width = (size * stride for size, stride in zip(input.shape[2:], self.stride, strict=True))
        (top, _), (left, _) = (
            _padding(*args) for args in zip((height, width), self.kernel_size, self.stride, strict=True)
        )
        output = full[:, :, top : top + height, left : left + width]
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


class GaussianNoise(nn.Module):
    """Additive noise in training."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn(x.shape, device=x.device, dtype=x.dtype) if self.training else x

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"


class Uniform(nn.Module):
    """Normal noise as uniform noise in (0, 1), by its distribution function."""

    def forward(self, latent: Tensor) -> Tensor:
        return torch.special.ndtr(latent)


def to_range(data: DataSet) -> nn.Module:
    """Output activation for the range of a data set's pixels."""
    return nn.Sigmoid() if data.range[0] == 0 else nn.Tanh()


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Linear layer, Glorot-uniform, with bias 0."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def convolution(channels: int, out: int, kernel: int, stride: int = 1, *, he: bool = True) -> SameConv2d:
    """Convolution initialised as in the WGAN-GP code, with a fan-out of 1 / stride^2 of the kernel."""
    layer = SameConv2d(channels, out, kernel, stride)
    _uniform(layer, channels * kernel**2, out * kernel**2 / stride**2, he)
    return layer


def transposed(channels: int, out: int, kernel: int, stride: int = 2, *, he: bool = True) -> SameConvTranspose2d:
    """Transposed convolution initialised as in the WGAN-GP code, with a fan-in of 1 / stride^2 of the kernel."""
    layer = SameConvTranspose2d(channels, out, kernel, stride)
    _uniform(layer, channels * kernel**2 / stride**2, out * kernel**2, he)
    return layer


def _uniform(layer: nn.Conv2d | nn.ConvTranspose2d, fan_in: float, fan_out: float, he: bool) -> None:
    """Initialise with variance 4 / (fan_in + fan_out), or half of that (Glorot), and bias 0."""
    bound = math.sqrt(3 * (4 if he else 2) / (fan_in + fan_out))
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding (before, after)."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
