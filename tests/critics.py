"""Critics of many kinds, and what plain PyTorch makes of their losses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_in_place": lambda: nn.ReLU(True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu_in_place": lambda: nn.LeakyReLU(0.2, True),
    "hardtanh": nn.Hardtanh,
    "relu6": lambda: nn.ReLU6(True),
    "prelu": nn.PReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=3),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "elu": nn.ELU,
}
PIECEWISE = ("relu", "relu_in_place", "leaky_relu", "leaky_relu_in_place", "hardtanh", "relu6", "prelu")
NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda channels, size: nn.Identity(),
    "layer_norm": lambda channels, size: nn.LayerNorm([channels, size, size]),
    "group_norm": lambda channels, size: nn.GroupNorm(1, channels),
    "instance_norm": lambda channels, size: nn.InstanceNorm2d(channels, affine=True),
}


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def dcgan(channels: int = 3, dim: int = 64, size: int = 32) -> nn.Sequential:
    """The DCGAN critic of WGAN-GP's code: 5 x 5 kernels of stride 2, LeakyReLU."""
    widths = [channels, dim, 2 * dim, 4 * dim]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 5, 2, 2), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * dim * (size // 8) ** 2, 1))


class ResidualBlock(nn.Module):
    """As in WGAN-GP's residual critic: pre-activation, mean pooling on the way down."""

    def __init__(self, before: int, after: int, size: int, norm: str, down: bool, first: bool = False) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.norms = nn.ModuleList([nn.Identity() if first else NORMS[norm](before, size), NORMS[norm](after, size)])
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first else F.relu(self.norms[0](x))
        h = self.conv2(F.relu(self.norms[1](self.conv1(h))))
        short = x
        if self.down:
            h, short = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.shortcut(short)


class ResidualCritic(nn.Module):
    """First block down, one down, two plain, ReLU, mean over the image, Linear (WGAN-GP, CIFAR)."""

    def __init__(self, dim: int = 64, size: int = 32, norm: str = "none", channels: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ResidualBlock(channels, dim, size, norm, True, first=True),
            ResidualBlock(dim, dim, size // 2, norm, True),
            ResidualBlock(dim, dim, size // 4, norm, False),
            ResidualBlock(dim, dim, size // 4, norm, False),
        )
        self.top = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(F.relu(self.blocks(x)).mean((2, 3)))


class MaxPooled(nn.Module):
    """Convolutions with max pooling, written with functions."""

    def __init__(self, channels: int = 3, dim: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, 2 * dim, 3, padding=1)
        self.top = nn.LazyLinear(1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.leaky_relu(self.conv2(x), 0.1), 3, stride=2, padding=1)
        return self.top(x.view(x.size(0), -1)).squeeze(1)


class SkipField(nn.Module):
    """A signed distance field: softplus MLP with the input joined in again halfway."""

    def __init__(self, width: int = 256, depth: int = 8, beta: float = 100.0) -> None:
        super().__init__()
        self.skip, self.beta = depth // 2, beta
        sizes = [3] + [width] * depth
        joined = [before + (3 if i == self.skip else 0) for i, before in enumerate(sizes[:-1])]
        self.layers = nn.ModuleList(nn.Linear(b, a) for b, a in zip(joined, sizes[1:], strict=True))
        self.top = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            h = torch.cat([h, x], dim=-1) if i == self.skip else h
            h = F.softplus(layer(h), beta=self.beta)
        return self.top(h)


class Featured(nn.Module):
    """Scores and features, with dropout, as CT-GAN's critics have."""

    def __init__(self, width: int = 16, p: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.LeakyReLU(0.2), nn.Dropout(p), nn.Linear(width, width))
        self.top = nn.Linear(width, 1)
        self.p = p

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.dropout(F.leaky_relu(self.body(x), 0.2), self.p, self.training)
        return self.top(features), features


class Noisy(nn.Module):
    """A critic whose passes differ by noise that a test can fix."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic, self.drawn, self.fixed = critic, [], []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.fixed.pop(0) if self.fixed else 0.3 * torch.randn_like(x)
        self.drawn.append(noise)
        return self.critic(x + noise)


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def plain_points(real: Tensor, fake: Tensor, eps: Tensor, penalty: str) -> Tensor:
    if penalty == "r1":
        return real.detach()
    if penalty == "r2":
        return fake.detach()
    eps = eps.reshape(-1, *[1] * (real.dim() - 1))
    return (eps * real + (1 - eps) * fake).detach()


def plain_penalty(critic: nn.Module, points: Tensor, target: float = 1.0, one_sided: bool = False) -> Tensor:
    points = points.detach().requires_grad_()
    (grad,) = torch.autograd.grad(first(critic(points)).sum(), points, create_graph=True)
    if target == 0:
        return grad.flatten(1).square().sum(1).mean()
    excess = grad.flatten(1).norm(2, dim=1) - target
    return (excess.clamp(min=0) if one_sided else excess).square().mean()


def plain_loss(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    eps: Tensor,
    objective: str = "wgan",
    penalty: str = "wgan-gp",
    weight: float = 10.0,
) -> Tensor:
    on_real, on_fake = first(critic(real)), first(critic(fake))
    if objective == "wgan":
        loss = on_fake.mean() - on_real.mean()
    else:
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    if penalty == "none":
        return loss
    target = 1.0 if penalty == "wgan-gp" else 0.0
    return loss + weight * plain_penalty(critic, plain_points(real, fake, eps, penalty), target)
