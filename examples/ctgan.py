"""CTGAN: a table's rows from a conditional WGAN-GP whose critic sees packs of ten.

Xu et al. 2019, "Modeling Tabular Data using Conditional GAN", section 4.3 and 4.4: the critic of two layers of 256 with
LeakyReLU 0.2 and dropout 0.5 scores ten rows at once (PacGAN, Lin et al. 2018), the gradient norm of WGAN-GP is that of
a whole pack, and one eps is drawn for each:

    E D(fake pack) - E D(real pack) + 10 E (|∇D(interpolated pack)| - 1)².

The generator is given the class as a one-hot vector, draws it by a Gumbel softmax of temperature 0.2, and pays the
cross entropy where it differs. Kept simple: one discrete column, and continuous columns as normal scores (quantiles) in
place of mode-specific normalisation.

    python examples/ctgan.py                    # about two minutes
    python examples/ctgan.py --steps 20

The table is scikit-learn's breast cancer data, 569 rows. Writes as many generated ones to ``ctgan.csv`` and histograms
to ``ctgan.png``; prints how well a random forest tells both apart (AUC 0.5: not at all), and its accuracy on real rows
when it was trained on generated ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import QuantileTransformer
from torch import Tensor, nn

import gpkernels as gpk

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, PACK, LATENT, WIDTH, CLASSES = 500, 10, 128, 256, 2


class Critic(nn.Module):
    """Score packs of rows: (N, columns) to (N / 10, 1)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (PACK * columns, WIDTH):
            layers += [nn.Linear(before, WIDTH), nn.LeakyReLU(0.2), nn.Dropout(0.5)]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows.reshape(len(rows) // PACK, -1))


class Residual(nn.Module):
    """Join what a layer makes of its input to the input."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(before, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x), x], 1)


class Generator(nn.Module):
    """Return continuous columns and the logits of the class."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        start = LATENT + CLASSES
        self.net = nn.Sequential(
            Residual(start), Residual(start + WIDTH), nn.Linear(start + 2 * WIDTH, columns + CLASSES)
        )

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(torch.cat([torch.randn(len(condition), LATENT), condition], 1))
        return out[:, :-CLASSES], out[:, -CLASSES:]


def drawn(columns: Tensor, logits: Tensor, condition: Tensor) -> Tensor:
    """Return rows as the critic sees them: continuous columns, the class drawn, the class asked for."""
    return torch.cat([columns, F.gumbel_softmax(logits, tau=0.2), condition], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of both networks (default: 2000)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    table, label = load_breast_cancer(return_X_y=True)
    names = load_breast_cancer().feature_names
    scores = QuantileTransformer(n_quantiles=len(table), output_distribution="normal").fit(table)
    rows = torch.from_numpy(scores.transform(table)).float().clamp(-3, 3)
    one_hot = F.one_hot(torch.from_numpy(label), CLASSES).float()

    critic, generator = Critic(rows.shape[1] + 2 * CLASSES), Generator(rows.shape[1])
    critic_loss = gpk.CriticLoss(critic, pack=PACK)
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.9))
    generator_optimiser = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.9), weight_decay=1e-6)
    for step in range(1, options.steps + 1):
        batch = torch.randint(len(rows), (BATCH,))
        condition = one_hot[batch]
        with torch.no_grad():
            columns, logits = generator(condition)
            fake = drawn(columns, logits, condition)
        parts = critic_loss(torch.cat([rows[batch], condition, condition], 1), fake)
        critic_optimiser.zero_grad()
        parts.loss.backward()
        critic_optimiser.step()

        columns, logits = generator(condition)
        adversarial = gpk.wgan_generator_loss(critic(drawn(columns, logits, condition)))
        generator_optimiser.zero_grad()
        (adversarial + F.cross_entropy(logits, condition)).backward()
        generator_optimiser.step()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step}: critic {parts.adversarial.item():.3f}, penalty {parts.penalty.item():.4f}", flush=True)

    with torch.no_grad():
        columns, logits = generator.eval()(one_hot)
    made, made_label = scores.inverse_transform(columns.numpy()), logits.argmax(1).numpy()
    forest = RandomForestClassifier(100, random_state=options.seed)
    origin = np.repeat([0, 1], len(table))
    auc = cross_val_score(forest, np.concatenate([table, made]), origin, scoring="roc_auc", cv=5).mean()
    for j in range(4):
        print(f"{names[j]}: mean {table[:, j].mean():.2f} ± {table[:, j].std():.2f}, generated", end=" ")
        print(f"{made[:, j].mean():.2f} ± {made[:, j].std():.2f}")
    print(f"real from generated: AUC {auc:.3f}")
    print(f"trained on generated rows, accuracy on real ones: {forest.fit(made, made_label).score(table, label):.3f}")
    header = ",".join([*names, "class"])
    np.savetxt(options.out / "ctgan.csv", np.c_[made, made_label], "%.6g", ",", header=header, comments="")
    _, axes = plt.subplots(2, 3, figsize=(12, 7))
    for j, ax in enumerate(axes.flat):
        ax.hist([table[:, j], made[:, j]], 24, label=["real", "generated"])
        ax.set_title(names[j])
    axes[0, 0].legend(loc="upper right")
    plt.savefig(options.out / "ctgan.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
