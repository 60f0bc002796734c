"""R3GAN's loss on stacked digits, with all 1000 modes counted.

Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern Baseline GAN": the relativistic loss of pairs (eq. 2)
with R1 and R2 in every step, networks with residual blocks, trained biases, grouped convolutions and no normalisation:

    critic:     E softplus(D(G(z)) - D(x))  +  γ/2 E |∇D(x)|²  +  γ/2 E |∇D(G(z))|²
    generator:  E softplus(D(x) - D(G(z)))

The data are StackedMNIST's idea (Metz et al. 2017) on scikit-learn's 8 x 8 digits: three random digits as the channels
of an image, 1000 modes. As in the literature a classifier, trained here, names the mode of each of 26 000 samples;
printed are the modes hit at least once, and the KL divergence of the modes' frequencies from the uniform distribution.
Noise hits many modes, too, so look at both and at the picture.

    python examples/r3gan.py                    # several minutes
    python examples/r3gan.py --steps 800        # 866 modes, KL 0.95

Writes real and generated samples to ``r3gan.png``, and each mode's count to ``r3gan.csv``.
"""

from __future__ import annotations

import argparse
from math import log
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

import gpkernels as gpk

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, GAMMA, LATENT, WIDTH, SAMPLES = 64, 0.1, 64, 32, 26000


class Block(nn.Module):
    """Residual block of a 1 x 1, a grouped 3 x 3 and a 1 x 1 convolution, the last of which begins at zero."""

    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__()
        last = nn.Conv2d(2 * width, width, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.convolutions = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=groups),
            nn.LeakyReLU(0.2),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolutions(x)


def make_critic() -> nn.Sequential:
    """Map 3 x 8 x 8 images to scores."""
    body = [nn.Conv2d(3, WIDTH, 3, padding=1), Block(WIDTH), nn.AvgPool2d(2), Block(WIDTH), nn.AvgPool2d(2)]
    return nn.Sequential(*body, Block(WIDTH), nn.Flatten(), nn.Linear(4 * WIDTH, 1))


def make_generator() -> nn.Sequential:
    """Map noise to 3 x 8 x 8 images."""
    head = [nn.Linear(LATENT, 4 * WIDTH), nn.Unflatten(1, (WIDTH, 2, 2)), Block(WIDTH)]
    up = [nn.Upsample(scale_factor=2), Block(WIDTH), nn.Upsample(scale_factor=2), Block(WIDTH)]
    return nn.Sequential(*head, *up, nn.Conv2d(WIDTH, 3, 3, padding=1))


def coverage(images: Tensor, classifier: MLPClassifier) -> tuple[np.ndarray, int, float]:
    """Return each mode's count, how many are hit, and KL(frequencies || uniform)."""
    digits = classifier.predict(images.reshape(-1, 64).numpy()).reshape(-1, 3)
    counts = np.bincount(digits @ [100, 10, 1], minlength=1000)
    share = counts[counts > 0] / counts.sum()
    return counts, int((counts > 0).sum()), float((share * np.log(share)).sum() + log(1000))


def tiled(images: Tensor) -> np.ndarray:
    """Arrange 64 images as one of 8 x 8."""
    return images[:64].reshape(8, 8, 3, 8, 8).permute(0, 3, 1, 4, 2).reshape(64, 64, 3).clamp(-1, 1).numpy() / 2 + 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="steps of both networks (default: 3000)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    data = load_digits()
    digits = torch.from_numpy(data.images).float() / 8 - 1  # in [-1, 1]
    flat = digits.reshape(-1, 64).numpy()
    classifier = MLPClassifier(128, learning_rate_init=3e-3, tol=1e-3, alpha=1e-2, random_state=options.seed)
    accuracy = classifier.fit(flat[:1500], data.target[:1500]).score(flat[1500:], data.target[1500:])
    print(f"classifier: accuracy {accuracy:.3f} on digits that it has not seen")

    critic, generator = make_critic(), make_generator()
    critic_loss = gpk.CriticLoss(critic, objective="relativistic", penalty={"r1": GAMMA / 2, "r2": GAMMA / 2})
    optimisers = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.99)) for net in (critic, generator)]
    for step in range(1, options.steps + 1):
        real = digits[torch.randint(len(digits), (BATCH, 3))]
        with torch.no_grad():
            fake = generator(torch.randn(BATCH, LATENT))
        parts = critic_loss(real, fake)
        optimisers[0].zero_grad()
        parts.loss.backward()
        optimisers[0].step()

        fake = generator(torch.randn(BATCH, LATENT))
        with torch.no_grad():
            real_scores = critic(real)
        loss = gpk.relativistic_generator_loss(real_scores, critic(fake))
        optimisers[1].zero_grad()
        loss.backward()
        optimisers[1].step()
        if step % max(1, options.steps // 5) == 0:
            r1, r2 = parts.penalty["r1"].item(), parts.penalty["r2"].item()
            print(f"step {step}: critic {parts.adversarial.item():.4f}, R1 {r1:.4f}, R2 {r2:.4f}", flush=True)

    with torch.no_grad():
        fake = torch.cat([generator(torch.randn(1000, LATENT)) for _ in range(SAMPLES // 1000)])
    counts, modes, divergence = coverage(fake, classifier)
    best = coverage(digits[torch.randint(len(digits), (SAMPLES, 3))], classifier)
    print(f"modes covered: {modes} of 1000, KL to uniform {divergence:.3f}")
    print(f"as many real samples: {best[1]} of 1000, KL to uniform {best[2]:.3f}")
    np.savetxt(options.out / "r3gan.csv", np.stack([np.arange(1000), counts], 1), "%d", ",", header="mode,count")
    _, axes = plt.subplots(1, 2, figsize=(10, 5))
    for ax, images, title in zip(axes, (real, fake), ("real", "generated"), strict=True):
        ax.imshow(tiled(images))
        ax.set_title(title)
        ax.axis("off")
    plt.savefig(options.out / "r3gan.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
