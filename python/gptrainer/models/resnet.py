"""The residual networks of the WGAN-GP code for CIFAR-10, unconditional."""

from __future__ import annotations

from torch import Tensor, nn

from gptrainer.data import DataSet
from gptrainer.models.layers import FeatureCritic, Pair, convolution, linear, to_range

Dropout = tuple[float, float, float]
CT_DROPOUT: Dropout = (0.2, 0.5, 0.5)  # Wei et al. 2018


class Block(nn.Module):
    """Residual block of two 3x3 convolutions, upsampling before the first or downsampling after the last.

    change: "up", "down" or "none".
    first: a critic's first block, without an activation of the images, and with pooling first in the shortcut.
    """

    def __init__(self, channels: int, out: int, change: str, *, batch_norm: bool = False, first: bool = False) -> None:
        super().__init__()
        up: list[nn.Module] = [nn.Upsample(scale_factor=2)] if change == "up" else []
        down: list[nn.Module] = [nn.AvgPool2d(2)] if change == "down" else []
        before, between = ([*([nn.BatchNorm2d(n)] if batch_norm else []), nn.ReLU()] for n in (channels, out))
        self.residual = nn.Sequential(
            *([] if first else before), *up, convolution(channels, out, 3),
            *between, convolution(out, out, 3), *down,
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if up or down:
            match = convolution(channels, out, 1, he=False)
            self.shortcut = nn.Sequential(*down, match) if first else nn.Sequential(*up, match, *down)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, out, 2H, 2W), (N, out, H/2, W/2) or (N, out, H, W)."""
        return self.shortcut(x) + self.residual(x)


def build(data: DataSet, latent: int, width: int, batch_norm: bool, *, dropout: Dropout = (0.0, 0.0, 0.0)) -> Pair:
    """Build three upsampling blocks, and a critic of two downsampling and two further blocks of ``width`` channels.

    dropout: after the critic's second, third and fourth block.
    """
    generator = nn.Sequential(
        linear(latent, width * 16),
        nn.Unflatten(1, (width, 4, 4)),
        *(Block(width, width, "up", batch_norm=True) for _ in range(3)),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        convolution(width, data.shape[0], 3, he=False),
        to_range(data),
    )
    blocks = [Block(width, width, change) for change in ("down", "none", "none")]
    layers: list[nn.Module] = [Block(data.shape[0], width, "down", first=True)]
    for block, p in zip(blocks, dropout, strict=True):
        layers += [block, *([nn.Dropout(p)] if p else [])]
    return generator, FeatureCritic(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(width, 1))
