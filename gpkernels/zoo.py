"""Critics of the papers and hand-written losses, as references for measuring and verifying."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda channels, size: nn.Identity(),
    "layer_norm": lambda channels, size: nn.LayerNorm([channels, size, size]),
    "group_norm": lambda channels, size: nn.GroupNorm(1, channels),
    "instance_norm": lambda channels, size: nn.InstanceNorm2d(channels, affine=True),
}


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    """Build an MLP: Linear layers with an activation between them, after LayerNorm if requested."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def dcgan(channels: int = 3, dim: int = 64, size: int = 32) -> nn.Sequential:
    """Build the DCGAN critic of WGAN-GP's code: 5 x 5 kernels of stride 2, LeakyReLU."""
    widths = [channels, dim, 2 * dim, 4 * dim]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 5, 2, 2), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * dim * (size // 8) ** 2, 1))


class ResidualBlock(nn.Module):
    """Residual block of WGAN-GP's critic: pre-activation, mean pooling where it downsamples."""

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
    """Residual critic of WGAN-GP for CIFAR: two blocks that downsample, two that do not, mean pooling, Linear."""

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


class SkipField(nn.Module):
    """Signed distance field: softplus MLP with a skip connection from the input to its middle.

    It begins as the distance to a sphere (Atzmon & Lipman 2020, theorem 1). With PyTorch's initialisation, gradients of
    a sharp softplus vanish to denormals layer by layer, which are slow on CPUs.
    """

    def __init__(self, width: int = 256, depth: int = 8, beta: float = 100.0) -> None:
        super().__init__()
        self.skip, self.beta = depth // 2, beta
        sizes = [3] + [width] * depth
        joined = [before + (3 if i == self.skip else 0) for i, before in enumerate(sizes[:-1])]
        self.layers = nn.ModuleList(nn.Linear(b, a) for b, a in zip(joined, sizes[1:], strict=True))
        self.top = nn.Linear(width, 1)
        for weight, bias in (layer.parameters() for layer in self.layers):
            nn.init.normal_(weight, 0.0, (2 / width) ** 0.5)
            nn.init.zeros_(bias)
        nn.init.normal_(self.top.weight, (pi / width) ** 0.5, 1e-5)
        nn.init.constant_(self.top.bias, -0.7)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            h = torch.cat([h, x], dim=-1) if i == self.skip else h
            h = F.softplus(layer(h), beta=self.beta)
        return self.top(h)


class Transformer(nn.Module):
    """Encoder layers with LayerNorm in front and PyTorch's fused attention, a mean over tokens, Linear."""

    def __init__(self, features: int, width: int = 64, heads: int = 4, depth: int = 2, tokens: int = 16) -> None:
        super().__init__()
        self.input = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.top = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(x) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.top(h.mean(1))


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks with LayerNorm in front and PyTorch's fused attention, Linear."""

    def __init__(self, pixels: int = 32, patch: int = 4, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (pixels // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(VisionBlock(width, heads) for _ in range(depth)))
        self.top = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.first.expand(len(h), -1, -1), h], 1) + self.position
        return self.top(self.blocks(h)[:, 0])


class VisionBlock(nn.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norms[1](x))


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the scores of a critic that may return features with them."""
    return output[0] if isinstance(output, (tuple, list)) else output


def plain_points(real: Tensor, fake: Tensor, eps: Tensor, penalty: str) -> Tensor:
    """Return the points at which the gradient is penalised."""
    if penalty == "r1":
        return real.detach()
    if penalty == "r2":
        return fake.detach()
    eps = eps.reshape(-1, *[1] * (real.dim() - 1))
    return (eps * real + (1 - eps) * fake).detach()


def plain_penalty(critic: nn.Module, points: Tensor, target: float = 1.0, one_sided: bool = False) -> Tensor:
    """Compute mean (|grad D| - target)^2 at points by double backward."""
    points = points.detach().requires_grad_()
    return _penalty_on(first(critic(points)), points, target, one_sided)


def _penalty_on(scores: Tensor, points: Tensor, target: float, one_sided: bool = False) -> Tensor:
    (grad,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
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
    """Compute the critic's whole loss by double backward, in the order of calls of an unbatched ``CriticLoss``.

    R1 and R2 share the call that scores their samples, as in the code of Mescheder et al. and of Karras et al., unless
    gradients at the samples are wanted.
    """
    shared = penalty in ("r1", "r2") and not (real.requires_grad or fake.requires_grad)
    samples = {"r2": fake, "r1": real}
    if shared:
        samples[penalty] = samples[penalty].detach().requires_grad_()
    on_fake, on_real = [first(critic(x)) for x in samples.values()]
    if objective == "wgan":
        loss = on_fake.mean() - on_real.mean()
    else:
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    if penalty == "none":
        return loss
    if shared:
        return loss + weight * _penalty_on(on_real if penalty == "r1" else on_fake, samples[penalty], 0.0)
    target = 1.0 if penalty == "wgan-gp" else 0.0
    return loss + weight * plain_penalty(critic, plain_points(real, fake, eps, penalty), target)
