"""IGR: a neural signed distance field from a point cloud with normals, and its mesh.

Gropp et al. 2020, "Implicit Geometric Regularization for Learning Shapes", eq. 2 with the normals of section 4, and the
geometric initialisation of Atzmon & Lipman 2020: a softplus network (β = 100) with a skip connection and the loss

    E_surface (|f| + τ |∇f - n|)  +  λ E (|∇f| - 1)²,   τ = 1, λ = 0.1,

the last expectation over points near the surface and in the whole box. Value and gradient come from one call of
``value_and_input_gradient``, and the loss may be any function of both.

    python examples/sdf.py                      # about a minute
    python examples/sdf.py --steps 50

The shape is a torus with radii 0.6 and 0.25, of which the network sees 8192 points. Writes the mesh of f = 0 to
``sdf.obj`` and a picture of it to ``sdf.png``, and prints the error of the distance, which is known.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from math import pi
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

import gpkernels as gpk

matplotlib.use("Agg")
import matplotlib.pyplot as plt

R, r, TAU, LAMBDA, BATCH, SPREAD = 0.6, 0.25, 1.0, 0.1, 512, 0.1


class Field(nn.Module):
    """Softplus MLP whose input joins again in its middle; made to begin as the distance to a sphere."""

    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.skip = depth // 2
        sizes = [3, *[width] * depth]
        self.layers = nn.ModuleList(
            nn.Linear(before, after - 3 if i == self.skip - 1 else after)
            for i, (before, after) in enumerate(pairwise(sizes))
        )
        self.top = nn.Linear(width, 1)
        for weight, bias in (layer.parameters() for layer in self.layers):
            nn.init.normal_(weight, 0.0, (2 / len(weight)) ** 0.5)
            nn.init.zeros_(bias)
        nn.init.normal_(self.top.weight, (pi / width) ** 0.5, 1e-5)
        nn.init.constant_(self.top.bias, -0.7)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            h = torch.cat([h, x], 1) / 2**0.5 if i == self.skip else h
            h = nn.functional.softplus(layer(h), beta=100)
        return self.top(h)


def torus(n: int) -> tuple[Tensor, Tensor]:
    """Return points of the surface and their outward normals."""
    u, v = 2 * pi * torch.rand(2, n)
    normals = torch.stack([u.cos() * v.cos(), u.sin() * v.cos(), v.sin()], 1)
    return R * torch.stack([u.cos(), u.sin(), torch.zeros(n)], 1) + r * normals, normals


def true_distance(x: Tensor) -> Tensor:
    return torch.hypot(x[:, :2].norm(dim=1) - R, x[:, 2]) - r


def mesh(field: nn.Module, size: int = 64, steps: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and quads of f = 0: a vertex for each cell that it crosses, moved onto it by the gradient."""
    axis = torch.linspace(-1, 1, size)
    with torch.no_grad():
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        inside = torch.cat([field(part) for part in grid.split(1 << 16)]).reshape(size, size, size).numpy() < 0
    inside = np.pad(inside, 1).astype(int)  # the surface is closed
    corners = [inside[a : a + size + 1, b : b + size + 1, c : c + size + 1] for a, b, c in np.ndindex(2, 2, 2)]
    crossed = np.min(corners, 0) < np.max(corners, 0)
    number = np.cumsum(crossed).reshape(crossed.shape) - 1
    faces = []
    for i, u, v in np.eye(3, dtype=int)[[[0, 1, 2], [1, 2, 0], [2, 0, 1]]]:  # an edge along i has four cells around it
        change = np.diff(inside, axis=int(i.argmax()))
        edges = np.argwhere(change)
        quads = np.stack([number[tuple((edges - shift).T)] for shift in (0 * u, u, u + v, v)], 1)
        faces.append(np.where(change[tuple(edges.T)][:, None] < 0, quads, quads[:, ::-1]))
    x = torch.from_numpy((np.argwhere(crossed) - 0.5) * 2 / (size - 1) - 1).float()
    for _ in range(steps):
        value, gradient = gpk.value_and_input_gradient(field, x)
        x = (x - value * gradient / gradient.square().sum(1, keepdim=True).clamp(min=1e-6)).detach()
    return x.numpy(), np.concatenate(faces)


def loss_of(field: nn.Module, points: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its eikonal part."""
    near = points + SPREAD * torch.randn_like(points)
    everywhere = 2 * torch.rand(len(points) // 8, 3) - 1
    value, gradient = gpk.value_and_input_gradient(field, points)
    data = value.abs().mean() + TAU * (gradient - normals).norm(dim=1).mean()
    eikonal = gpk.eikonal_loss(field, torch.cat([near, everywhere]))
    return data + LAMBDA * eikonal, eikonal.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps of Adam (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    cloud, normals = torus(8192)
    field = Field()
    optimiser = torch.optim.Adam(field.parameters(), lr=5e-4)
    for step in range(1, options.steps + 1):
        batch = torch.randint(len(cloud), (BATCH,))
        loss, eikonal = loss_of(field, cloud[batch], normals[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.4f}, E (|∇f| - 1)² {eikonal.item():.4f}", flush=True)

    with torch.no_grad():
        box = 2 * torch.rand(10000, 3) - 1
        error = (field(box).squeeze(1) - true_distance(box)).abs().mean()
    vertices, faces = mesh(field)
    print(f"mean error of the distance in the box: {error:.4f}")
    off = true_distance(torch.from_numpy(vertices)).abs().mean()
    print(f"mesh: {len(vertices)} vertices, {len(faces)} quads, mean distance to the torus {off:.4f}")
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices]
    lines += ["f " + " ".join(str(i + 1) for i in face) for face in faces]
    (options.out / "sdf.obj").write_text("\n".join(lines) + "\n", encoding="utf-8")

    axes = plt.figure(figsize=(6, 5)).add_subplot(projection="3d", box_aspect=(1, 1, 1))
    triangles = np.concatenate([faces[:, [0, 1, 2]], faces[:, [0, 2, 3]]])
    axes.plot_trisurf(*vertices.T, triangles=triangles)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    plt.savefig(options.out / "sdf.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
