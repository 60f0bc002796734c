"""R1 behind augmentations: the critic sees turned, recoloured and cut images, the penalty is on the originals.

Training with few images (Karras et al. 2020, "Training generative adversarial networks with limited data"): what the
critic sees, real or generated, has gone through the same differentiable augmentations T, drawn anew for each sample:

    L(D) = E softplus(-D(T x)) + E softplus(D(T G(z))) + gamma / 2 E |grad_x D(T x)|^2
    L(G) = E softplus(-D(T G(z)))

T is a part of what is differentiated; it is written in PyTorch's own functions, `affine_grid` and `grid_sample` among
them, in front of the critic.

    python examples/augmented_r1.py --out out    # about two minutes; needs scikit-learn; writes augmented_r1.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gpkernels

LATENT, BATCH, GAMMA, SIZE = 32, 64, 1.0, 16


class Augment(nn.Module):
    """Draws for each sample a rotation, scale and shift, a brightness and contrast, and a cutout."""

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        angle, scale = 0.3 * torch.randn(n), torch.exp(0.1 * torch.randn(n))
        turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
        theta = torch.cat([turned * scale.view(n, 1, 1), 0.1 * torch.randn(n, 2, 1)], 2)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        x = x * torch.exp(0.2 * torch.randn(n, 1, 1, 1)) + 0.1 * torch.randn(n, 1, 1, 1)
        row, column = (torch.rand(n, 1, 1) for _ in range(2))
        places = torch.linspace(0, 1, x.shape[-1])
        kept = ((places[:, None] - row).abs() > 0.15) | ((places - column).abs() > 0.15)
        return x * kept[:, None]


def critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * (SIZE // 4) ** 2, 1)
    )  # fmt: skip


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(LATENT, 64 * 16), nn.Unflatten(1, (64, 4, 4)), nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 32, 3, 1, 1), nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2), nn.Conv2d(32, 1, 3, 1, 1)
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=200, help="how few (default: 200)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    images = torch.tensor(load_digits().images).float()[:, None] / 8 - 1
    images = F.interpolate(images[: options.images], (SIZE, SIZE), mode="bilinear")
    T, G = Augment(), generator()
    D = nn.Sequential(T, critic())
    critic_loss = gpkernels.CriticLoss(D, objective="gan", penalty="r1", penalty_weight=GAMMA / 2)
    d_optimizer, g_optimizer = (torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.99)) for net in (D, G))
    for step in range(options.steps):
        real = images[torch.randint(len(images), (BATCH,))]
        fake = G(torch.randn(BATCH, LATENT))
        parts = critic_loss(real, fake.detach())
        d_optimizer.zero_grad()
        parts.loss.backward()
        d_optimizer.step()

        loss = gpkernels.nonsaturating_generator_loss(D(fake))
        g_optimizer.zero_grad()
        loss.backward()
        g_optimizer.step()
        if step % 100 == 0:
            print(f"step {step:4}  critic {parts.adversarial:.3f}  generator {loss:.3f}  R1 {parts.penalty:.4f}")

    with torch.no_grad():
        drawn = torch.cat([images[:48], T(images[:48]), G(torch.randn(48, LATENT))])
    rows = drawn.view(12, 12, SIZE, SIZE).permute(0, 2, 1, 3).reshape(12 * SIZE, 12 * SIZE)
    plt.imsave(options.out / "augmented_r1.png", rows.kron(torch.ones(3, 3)), cmap="gray", vmin=-1, vmax=1)


if __name__ == "__main__":
    main()
