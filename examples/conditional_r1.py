"""A conditional critic in StyleGAN2's manner, trained with lazy R1 on handwritten digits.

Formulas (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN"; Miyato & Koyama 2018):

    L(D) = E softplus(-D(x, y)) + E softplus(D(G(z, y), y)) + gamma / 2 E |grad_x D(x, y)|^2
    L(G) = E softplus(-D(G(z, y), y)),    D(x, y) = <phi(x), v(y)> / sqrt(d)

R1 is taken in every 16th step only, with 16 times its weight. The critic has weights scaled at run time, residual
blocks, minibatch standard deviation, and a projection on an embedding of the label, which it gets as `critic_args`.

    python examples/conditional_r1.py --out out    # about a minute; needs scikit-learn; writes conditional_r1.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import gpkernels

CLASSES, LATENT = 10, 32
activation = nn.LeakyReLU(0.2)


class Linear(nn.Linear):
    """Linear layer with an equalised learning rate: weights of unit variance, scaled in each call."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


class Conv(nn.Conv2d):
    """Convolution with an equalised learning rate that keeps the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        nn.init.normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / math.sqrt(self.weight[0].numel()), self.bias, padding=self.padding)


def with_deviation(x: Tensor, group: int = 4) -> Tensor:
    """Append a channel: the standard deviation within groups of samples, averaged over channels and pixels."""
    grouped = x.view(group, len(x) // group, *x.shape[1:])
    deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat([x, deviation.repeat(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)


class Block(nn.Module):
    """Residual block that halves the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, channels, 3), Conv(channels, channels, 3)
        self.shortcut = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = activation(self.conv2(activation(self.conv1(x))))
        return (F.avg_pool2d(h, 2) + F.avg_pool2d(self.shortcut(x), 2)) / math.sqrt(2)


class Critic(nn.Module):
    """Maps images (N, colours, size, size) and labels (N,) to logits (N,)."""

    def __init__(self, channels: int = 32, size: int = 8, colours: int = 1, width: int = 64) -> None:
        super().__init__()
        self.first = Conv(colours, channels, 1)
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(int(math.log2(size)) - 2)])
        self.last, self.features = Conv(channels + 1, channels, 3), Linear(16 * channels, width)
        self.projection, self.embedding = Linear(width, width), nn.Embedding(CLASSES, width)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.blocks(activation(self.first(x)))
        h = activation(self.last(with_deviation(h)))
        h = self.projection(activation(self.features(h.flatten(1))))
        return (h * self.embedding(labels)).sum(1) / math.sqrt(h.shape[1])


class Generator(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(CLASSES, LATENT), Linear(2 * LATENT, 16 * channels)
        self.body = nn.Sequential(
            nn.Unflatten(1, (channels, 4, 4)), activation, Conv(channels, channels, 3), activation,
            nn.Upsample(scale_factor=2, mode="bilinear"), Conv(channels, channels, 3), activation, Conv(channels, 1, 1)
        )  # fmt: skip

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.body(self.first(torch.cat([z, self.embedding(labels)], 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    images, targets = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    critic, generator, every, gamma, batch = Critic(), Generator(), 16, 1.0, 64
    critic_loss = gpkernels.CriticLoss(
        critic, objective="gan", penalty="r1", penalty_weight=gamma / 2, penalty_every=every
    )
    lazy = every / (every + 1)  # as StyleGAN2 corrects Adam for the additional steps of R1
    critic_optimizer = torch.optim.Adam(critic.parameters(), 2e-3 * lazy, (0.0, 0.99**lazy))
    generator_optimizer = torch.optim.Adam(generator.parameters(), 2e-3, (0.0, 0.99))
    for step in range(options.steps):
        chosen = torch.randint(len(images), (batch,))
        real, labels = images[chosen], targets[chosen]
        fake = generator(torch.randn(batch, LATENT), labels)
        parts = critic_loss(real, fake.detach(), critic_args=(labels,))
        critic_optimizer.zero_grad()
        parts.loss.backward()
        critic_optimizer.step()

        generator_optimizer.zero_grad()
        loss = gpkernels.nonsaturating_generator_loss(critic(fake, labels))
        loss.backward()
        generator_optimizer.step()
        if step % (10 * every) == 0:
            print(f"step {step:4}  critic {parts.adversarial:.3f}  generator {loss:.3f}  R1 {parts.penalty:.4f}")

    labels = torch.arange(CLASSES).repeat_interleave(48)
    with torch.no_grad():
        samples = generator(torch.randn(len(labels), LATENT), labels)
    accuracy = LogisticRegression(max_iter=1000).fit(images.flatten(1), targets).score(samples.flatten(1), labels)
    print(f"a classifier of real digits finds the label of {accuracy:.1%} of the samples")
    rows = samples.view(CLASSES, 48, 8, 8)[:, :12].permute(0, 2, 1, 3).reshape(80, 96)
    plt.imsave(options.out / "conditional_r1.png", rows.kron(torch.ones(5, 5)), cmap="gray")


if __name__ == "__main__":
    main()
