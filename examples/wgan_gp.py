"""WGAN-GP on a ring of eight Gaussians: the plain training loop with ``CriticLoss``.

The toy experiment of Gulrajani et al. 2017, "Improved Training of Wasserstein GANs" (Algorithm 1, section 5 and the
hyperparameters of its toy code: λ = 0.1, five critic steps per generator step, Adam with learning rate 1e-4 and betas
(0.5, 0.9)). The critic's loss is E D(G(z)) - E D(x) + λ E (|∇D(x̂)| - 1)².

    python examples/wgan_gp.py                  # about two minutes
    python examples/wgan_gp.py --steps 1000     # generator steps; already 8 of 8 modes

Writes the samples over the critic's values to ``wgan_gp.png``, and the losses to ``wgan_gp.csv``.
"""

from __future__ import annotations

import argparse
import csv
from itertools import pairwise
from math import pi
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

import gpkernels as gpk

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, CRITIC_STEPS, LAMBDA, SIGMA = 256, 5, 0.1, 0.02
ANGLES = torch.arange(8) * pi / 4
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def gaussians(n: int) -> Tensor:
    """Draw from eight Gaussians on a circle, scaled to unit variance per coordinate."""
    return (CENTRES[torch.randint(8, (n,))] + SIGMA * torch.randn(n, 2)) / 2**0.5


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


def coverage(samples: Tensor) -> tuple[int, float]:
    """Return how many modes have at least 1 % of the samples, and the share of samples close to a mode."""
    distance, nearest = torch.cdist(samples * 2**0.5, CENTRES).min(1)
    close = distance < 10 * SIGMA
    counts = torch.bincount(nearest[close], minlength=8)
    return int((counts >= len(samples) // 100).sum()), float(close.float().mean())


def draw(critic: nn.Module, real: Tensor, fake: Tensor, path: Path) -> None:
    axis = torch.linspace(-2, 2, 128)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    with torch.no_grad():
        scores = critic(torch.stack([x, y], 2).reshape(-1, 2)).reshape(128, 128)
    plt.figure(figsize=(5, 5))
    plt.contourf(x.numpy(), y.numpy(), scores.numpy(), 24, alpha=0.6)
    plt.scatter(real[:, 0], real[:, 1], s=6, color="orange", label="real")
    plt.scatter(fake[:, 0], fake[:, 1], s=6, color="green", label="generated")
    plt.axis((-2, 2, -2, 2))
    plt.legend(loc="upper right")
    plt.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="generator steps (default: 2000)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    critic, generator = mlp(2, 128, 128, 128, 1), mlp(2, 128, 128, 128, 2)
    critic_loss = gpk.CriticLoss(critic, penalty_weight=LAMBDA)
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.5, 0.9))
    generator_optimiser = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.5, 0.9))

    curves = []
    for step in range(1, options.steps + 1):
        for _ in range(CRITIC_STEPS):
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, 2))
            parts = critic_loss(gaussians(BATCH), fake)
            critic_optimiser.zero_grad()
            parts.loss.backward()
            critic_optimiser.step()
        loss = gpk.wgan_generator_loss(critic(generator(torch.randn(BATCH, 2))))
        generator_optimiser.zero_grad()
        loss.backward()
        generator_optimiser.step()
        curves.append((step, -parts.adversarial.item(), parts.penalty.item()))
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step}: Wasserstein estimate {curves[-1][1]:.4f}, penalty {curves[-1][2]:.4f}", flush=True)

    with torch.no_grad():
        fake = generator(torch.randn(4000, 2))
    modes, close = coverage(fake)
    print(f"modes covered: {modes} of 8, samples close to a mode: {100 * close:.1f} %")
    draw(critic, gaussians(500), fake[:500], options.out / "wgan_gp.png")
    with (options.out / "wgan_gp.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "wasserstein", "penalty"), *curves])


if __name__ == "__main__":
    main()
