"""Critics of docs/approximate.md, at initialisation and after a short training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gpkernels as gpk
from gpkernels.zoo import Transformer, dcgan, mlp

STEPS, BATCH = 300, 64


class MLP(nn.Module):
    """MLP for points in the plane."""

    shape: tuple[int, ...] = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.net = self.make()

    def make(self) -> nn.Module:
        return mlp(2, 128, 128, 128, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DCGAN(MLP):
    """DCGAN critic for images of 32 px."""

    shape = (3, 32, 32)

    def make(self) -> nn.Module:
        return dcgan(3, 16, 32)


class Attention(MLP):
    """Transformer for sequences of 16 tokens."""

    shape = (16, 32)

    def make(self) -> nn.Module:
        return Transformer(32, 64, 4, 2, tokens=16)


def trained(critic: MLP) -> None:
    """Train to separate normal data from wider data, with R1; weights and data follow PyTorch's global seed."""
    loss = gpk.CriticLoss(critic, objective="gan", penalty="r1", penalty_weight=0.5)
    optimiser = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.99))
    for _ in range(STEPS):
        real, fake = torch.randn(BATCH, *critic.shape), 1.5 * torch.randn(BATCH, *critic.shape)
        optimiser.zero_grad()
        loss(real, fake).loss.backward()
        optimiser.step()


class TrainedMLP(MLP):
    def __init__(self) -> None:
        super().__init__()
        trained(self)


class TrainedDCGAN(DCGAN):
    def __init__(self) -> None:
        super().__init__()
        trained(self)


class TrainedAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            trained(self)


class SoftenedMLP(TrainedMLP):
    """Trained MLP whose ReLUs are replaced by smooth functions."""

    def __init__(self) -> None:
        super().__init__()
        assert isinstance(self.net, nn.Sequential)
        for i, layer in enumerate(self.net):
            if isinstance(layer, nn.ReLU):
                self.net[i] = nn.Softplus(20.0)
