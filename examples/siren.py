"""SIREN: the signed distance of a plane curve from its oriented points, by a network of sines.

Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions": sin(ω₀ (W x + b)) with
ω₀ = 30, less in the first layer, and the initialisation of section 3.2; the loss of eq. 6 with its code's weights,

    50 E ||∇f| - 1|  +  3000 E_curve |f|  +  100 E_curve (1 - <∇f, n>)  +  100 E_off exp(-100 |f|).

The first term is not squared: ``eikonal_loss`` with ``power=1``, here ``gradient_norm_penalty`` of the gradient that
the third term needs, too. On the curve the value and the gradient come from one call of ``value_and_input_gradient``.

    python examples/siren.py                    # about half a minute
    python examples/siren.py --steps 100

The curve is a flower of five petals, r = 0.65 + 0.2 cos 5φ. Writes level lines of the field and its error to
``siren.png``.
"""

from __future__ import annotations

import argparse
from math import pi
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

import gpkernels as gpk

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POINTS = 512  # on the curve, and as many off it
FIRST = 3.0  # ω₀ of the first layer: 30, as for images, makes a distance field wavy


class Sine(nn.Module):
    """sin(ω₀ (W x + b)), initialised so that every layer's inputs are distributed alike."""

    def __init__(self, before: int, after: int, omega: float = 30.0, first: bool = False) -> None:
        super().__init__()
        self.omega, self.linear = omega, nn.Linear(before, after)
        bound = 1 / before if first else (6 / before) ** 0.5 / omega
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


def siren(width: int = 128, depth: int = 3) -> nn.Sequential:
    top = nn.Linear(width, 1)
    bound = (6 / width) ** 0.5 / 30
    nn.init.uniform_(top.weight, -bound, bound)
    return nn.Sequential(Sine(2, width, FIRST, first=True), *(Sine(width, width) for _ in range(depth - 1)), top)


def flower(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return points of the curve and their outward normals."""
    r, slope = 0.65 + 0.2 * torch.cos(5 * angle), -torch.sin(5 * angle)
    ray = torch.stack([angle.cos(), angle.sin()], 1)
    across = torch.stack([-angle.sin(), angle.cos()], 1)
    return r[:, None] * ray, nn.functional.normalize(r[:, None] * ray - slope[:, None] * across)


def true_distance(x: Tensor) -> Tensor:
    """Return the signed distance to the curve, up to the spacing of 2048 points on it."""
    distance = torch.cdist(x, flower(torch.linspace(0, 2 * pi, 2049)[:-1])[0]).min(1).values
    inside = x.norm(dim=1) < 0.65 + 0.2 * torch.cos(5 * torch.atan2(x[:, 1], x[:, 0]))
    return torch.where(inside, -distance, distance)


def loss_of(field: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the loss and its eikonal part at random points."""
    on, normals = flower(2 * pi * torch.rand(POINTS))
    off = 2 * torch.rand(POINTS, 2) - 1
    value, gradient = gpk.value_and_input_gradient(field, torch.cat([on, off]))
    eikonal = gpk.gradient_norm_penalty(gradient, power=1)  # eikonal_loss(field, points, power=1)
    alignment = (1 - nn.functional.cosine_similarity(gradient[:POINTS], normals, dim=1)).mean()
    away = torch.exp(-100 * value[POINTS:].abs()).mean()
    return 50 * eikonal + 3000 * value[:POINTS].abs().mean() + 100 * alignment + 100 * away, eikonal.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps of Adam (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    field = siren()
    optimiser = torch.optim.Adam(field.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, options.steps))
    for step in range(1, options.steps + 1):
        loss, eikonal = loss_of(field)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.2f}, E ||∇f| - 1| {eikonal.item():.4f}", flush=True)

    axis = torch.linspace(-1, 1, 128)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    grid = torch.stack([x, y], 2).reshape(-1, 2)
    with torch.no_grad():
        found, true = field(grid).squeeze(1), true_distance(grid)
    error = (found - true).abs()
    near = error[true.abs() < 0.1].mean()
    print(f"mean error of the distance: {error.mean():.4f}, within 0.1 of the curve: {near:.4f}")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5))
    for ax, z, title in zip(axes, (found, error), ("signed distance", "absolute error"), strict=True):
        figure.colorbar(ax.contourf(x.numpy(), y.numpy(), z.reshape(128, 128).numpy(), 24), ax=ax)
        ax.contour(x.numpy(), y.numpy(), found.reshape(128, 128).numpy(), [0.0], colors="white")
        ax.set_title(title)
        ax.set_aspect("equal")
    figure.savefig(options.out / "siren.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
