"""Small critics of many kinds, in which overhead per call dominates arithmetic, as on GPUs at most sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gpkernels.bench.cases import Case
from gpkernels.zoo import ResidualBlock, SkipField, mlp


class Calls(nn.Module):
    """A critic from its parts and a function of them and the batch."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def between(make: Callable[[int], list[nn.Module]], width: int = 64, inputs: int = 2) -> nn.Sequential:
    """Build an MLP of three hidden layers, with the given modules after each."""
    layers: list[nn.Module] = []
    for before in (inputs, width, width):
        layers += [nn.Linear(before, width), *make(width)]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def convolutional(norm: Callable[[int], list[nn.Module]], spectral: bool = False) -> nn.Sequential:
    """Build a DCGAN critic of 8 channels for images of 16 px."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 32)):
        convolution = nn.Conv2d(before, after, 4, 2, 1)
        layers += [spectral_norm(convolution) if spectral else convolution, *norm(after), _leaky()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 1))


def residual(norm: str) -> nn.Sequential:
    """Build two residual blocks of 8 channels for images of 16 px."""
    blocks = ResidualBlock(3, 8, 16, norm, True, first=True), ResidualBlock(8, 8, 8, norm, False)
    return nn.Sequential(*blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))


def spread(groups: int) -> Callable[[Tensor], Tensor]:
    """Compute StyleGAN2's minibatch standard deviation over groups of samples, as one more channel."""

    def add(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(min(groups, n), -1, 1, c, h, w)
        y = (y - y.mean(0)).square().mean(0)
        y = (y + 1e-8).sqrt().mean([2, 3, 4]).reshape(-1, 1, 1, 1)
        return torch.cat([x, y.repeat(min(groups, n), 1, h, w)], 1)

    return add


class StyleBlock(nn.Module):
    """Block of StyleGAN2's critic: weights scaled in the call, explicit biases, a downsampling skip."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(before, before, 3, 3))
        self.second = nn.Parameter(torch.randn(after, before, 3, 3))
        self.skip = nn.Parameter(torch.randn(after, before, 1, 1))
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(before)), nn.Parameter(torch.zeros(after))])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for weight, bias, stride in ((self.first, self.biases[0], 1), (self.second, self.biases[1], 2)):
            scale = weight[0].numel() ** -0.5
            y = F.leaky_relu(F.conv2d(y, weight * scale, None, stride, 1) + bias.reshape(1, -1, 1, 1), 0.2) * 2**0.5
        return (y + F.conv2d(F.avg_pool2d(x, 2), self.skip * self.skip[0].numel() ** -0.5)) * 0.5**0.5


class R3Block(nn.Module):
    """Block of R3GAN: a grouped convolution between two of 1 x 1, explicit biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=4, bias=False)
        self.reduce = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(2 * channels)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.expand(x) + self.biases[0].view(1, -1, 1, 1), 0.2)
        y = F.leaky_relu(self.mix(y) + self.biases[1].view(1, -1, 1, 1), 0.2)
        return x + self.reduce(y)


class R3Critic(nn.Module):
    """Critic of R3GAN: two blocks, each with a strided convolution, and a projection onto a class embedding."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.input = nn.Conv2d(3, channels, 1)
        self.blocks = nn.Sequential(R3Block(channels), nn.AvgPool2d(2), R3Block(channels))
        self.basis = nn.Conv2d(channels, channels, 4, groups=channels, bias=False)
        self.top = nn.Linear(channels, 16, bias=False)
        self.classes = nn.Embedding(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.top(self.basis(self.blocks(self.input(x))).flatten(1))
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return (y * self.classes(labels)).sum(1, keepdim=True) / 4


def attention(s: Any, x: Tensor) -> Tensor:
    q, k, v = s.qkv(x).chunk(3, -1)
    return s.out((torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v).mean(1))


def batch_spread(s: Any, x: Tensor) -> Tensor:
    """Build an AMP discriminator that reads the spread of its batch."""
    h = F.relu(s.a(x))
    std = (h.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(h), 1)
    return s.c(F.relu(s.b(torch.cat([h, std], 1))))


def packed(s: Any, x: Tensor) -> Tensor:
    """Build CTGAN's critic: each sample is a pack of ten rows; here the batch counts packs."""
    return s.net(x.view(-1, 10 * 12))


def recurrent(s: Any, x: Tensor) -> Tensor:
    """Build a critic on the last state of a recurrent network, without cuDNN, which has no double backward."""
    with torch.backends.cudnn.flags(enabled=False):
        return s.out(s.rnn(x)[0][:, -1])


class Cubed(torch.autograd.Function):
    """Custom function, without a rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * cotangents[0] * x**2


def with_custom_function() -> nn.Module:
    return Calls(
        lambda s, x: s.out(F.relu(s.b(Cubed.apply(F.relu(s.a(x)))))),
        a=nn.Linear(16, 64),
        b=nn.Linear(64, 64),
        out=nn.Linear(64, 1),
    )


def _dropout(width: int) -> list[nn.Module]:
    return [_leaky(), nn.Dropout(0.5)]


class SineField(nn.Module):
    """SIREN."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.top = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.top(x)


IMAGES = (2, 3, 16, 16)
SMALL: dict[str, Case] = {
    "tanh, N 64": Case(lambda: between(lambda w: [nn.Tanh()]), (64, 2)),
    "tanh, N 2": Case(lambda: between(lambda w: [nn.Tanh()]), (2, 2)),
    "ReLU, N 2": Case(lambda: mlp(16, 64, 64, 64, 1), (2, 16)),
    "ReLU .view(-1), N 2": Case(lambda: Calls(lambda s, x: s.net(x).view(-1), net=mlp(16, 128, 128, 1)), (2, 16)),
    "LayerNorm, N 64": Case(lambda: between(lambda w: [nn.LayerNorm(w), nn.ReLU()]), (64, 2)),
    "RMSNorm, N 2": Case(lambda: between(lambda w: [nn.RMSNorm(w), _leaky()]), (2, 2)),
    "dropout, N 64": Case(lambda: between(_dropout), (64, 2)),
    "SiLU, N 64": Case(lambda: between(lambda w: [nn.SiLU()]), (64, 2)),
    "softplus, N 64": Case(lambda: between(lambda w: [nn.Softplus()]), (64, 2)),
    "sine, N 64": Case(SineField, (64, 3)),
    "DCGAN, N 2": Case(lambda: convolutional(lambda c: []), IMAGES),
    "DCGAN GroupNorm, N 2": Case(lambda: convolutional(lambda c: [nn.GroupNorm(4, c)]), IMAGES),
    "DCGAN InstanceNorm, N 2": Case(lambda: convolutional(lambda c: [nn.InstanceNorm2d(c, affine=True)]), IMAGES),
    "DCGAN BatchNorm, N 2": Case(lambda: convolutional(lambda c: [nn.BatchNorm2d(c)]), IMAGES),
    "DCGAN spectral norm, N 2": Case(lambda: convolutional(lambda c: [], spectral=True), IMAGES),
    "residual, N 2": Case(lambda: residual("none"), IMAGES),
    "residual GroupNorm, N 2": Case(lambda: residual("group_norm"), IMAGES),
    "residual InstanceNorm, N 2": Case(lambda: residual("instance_norm"), IMAGES),
    "StyleGAN2, N 4": Case(
        lambda: Calls(
            lambda s, x: s.out(s.add(s.blocks(x)).flatten(1)),
            blocks=nn.Sequential(nn.Conv2d(3, 8, 1), StyleBlock(8, 8), StyleBlock(8, 8)),
            out=nn.Linear(9 * 16, 1),
            add=Calls(lambda s, x: spread(4)(x)),
        ),
        (4, 3, 16, 16),
    ),
    "R3GAN, N 2": Case(R3Critic, (2, 3, 8, 8)),
    "CTGAN packs, N 10": Case(lambda: Calls(packed, net=between(_dropout, 64, 120)), (10, 120)),
    "GRU, N 4": Case(
        lambda: Calls(recurrent, rnn=nn.GRU(6, 16, batch_first=True), out=nn.Linear(16, 1)),
        (4, 6, 6),
    ),
    "LSTM, N 4": Case(
        lambda: Calls(recurrent, rnn=nn.LSTM(6, 16, batch_first=True), out=nn.Linear(16, 1)),
        (4, 6, 6),
    ),
    "custom function, N 2": Case(with_custom_function, (2, 16)),
    "custom function, N 64": Case(with_custom_function, (64, 16)),
    "cumulated product, N 16": Case(
        lambda: Calls(lambda s, x: s.out(s.a(x).sigmoid().cumprod(1)), a=nn.Linear(16, 32), out=nn.Linear(32, 1)),
        (16, 16),
    ),
    "PointNet, N 2": Case(
        lambda: Calls(lambda s, x: s.out(s.net(x).max(1)[0]), net=mlp(3, 32, 64, 64), out=mlp(64, 32, 1)), (2, 32, 3)
    ),
    "attention, N 4": Case(lambda: Calls(attention, qkv=nn.Linear(12, 48), out=nn.Linear(16, 1)), (4, 10, 12)),
    "AMP batch spread, N 16": Case(
        lambda: Calls(batch_spread, a=nn.Linear(105, 128), b=nn.Linear(129, 64), c=nn.Linear(64, 1)), (16, 105)
    ),
    "language, N 2": Case(
        lambda: nn.Sequential(
            nn.Conv1d(16, 32, 1),
            *(nn.Sequential(nn.ReLU(), nn.Conv1d(32, 32, 5, padding=2)) for _ in range(3)),
            nn.Flatten(),
            nn.Linear(32 * 8, 1),
        ),
        (2, 16, 8),
    ),
    "bias by hand, N 2": Case(
        lambda: Calls(
            lambda s, x: s.out(F.leaky_relu(s.conv(x) + s.bias.view(1, -1, 1, 1), 0.2).flatten(1)),
            conv=nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            bias=nn.Parameter(torch.zeros(16)),
            out=nn.Linear(16 * 64, 1),
        ),
        IMAGES,
    ),
    "SDF 3-32x8 with skips, N 64": Case(lambda: SkipField(32, 8), (64, 3)),
}
