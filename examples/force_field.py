"""A force field: an energy model trained on forces, the gradient of its energy, then used for molecular dynamics.

Formulas (as in SchNet, NequIP and MACE, here with an energy of pairs):

    E(r) = sum over pairs of MLP(rbf(|r_i - r_j|)),  F = -grad_r E
    loss = mean (E - E*)^2 + w mean |F - F*|^2

The reference is the Lennard-Jones potential, 4 (d^-12 - d^-6) a pair, sampled by Langevin dynamics. The learnt forces
come from an energy, so velocity Verlet conserves that energy; the picture shows how well.

    python examples/force_field.py --out out    # about half a minute; writes force_field.csv and force_field.png
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import gpkernels

ATOMS = 7
Energy = Callable[[Tensor], Tensor]


class PairDistances(nn.Module):
    """Distances of all pairs: (N, atoms, 3) to (N, pairs)."""

    def __init__(self, atoms: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Buffer(index) for index in torch.triu_indices(atoms, atoms, 1))

    def forward(self, positions: Tensor) -> Tensor:
        difference = positions[:, self.first] - positions[:, self.second]
        return difference.square().sum(-1).sqrt()


class EnergyModel(nn.Module):
    """Sum over pairs of an MLP of Gaussian radial basis functions of the distance."""

    def __init__(self, atoms: int, basis: int = 24, width: int = 64, cutoff: float = 4.0) -> None:
        super().__init__()
        self.distances = PairDistances(atoms)
        self.centres = nn.Buffer(torch.linspace(0.7, cutoff, basis))
        self.sharpness = (basis / cutoff) ** 2
        self.mlp = nn.Sequential(nn.Linear(basis, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.readout = nn.Linear(width, 1)

    def forward(self, positions: Tensor) -> Tensor:
        distance = self.distances(positions).unsqueeze(-1)
        basis = (-self.sharpness * (distance - self.centres).square()).exp()
        return self.readout(self.mlp(basis)).sum((1, 2))


def lennard_jones(positions: Tensor) -> Tensor:
    inverse = PairDistances(positions.shape[1])(positions) ** -6
    return (4 * (inverse.square() - inverse)).sum(1)


def forces(energy: Energy, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return energies and forces as plain numbers."""
    positions = positions.detach().requires_grad_()
    value = energy(positions)
    return value.detach(), -torch.autograd.grad(value.sum(), positions)[0]


def sampled(n: int, temperature: float = 0.3, time_step: float = 2e-3) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of n clusters in equilibrium, their energies and forces: overdamped Langevin dynamics."""
    ring = 2 * torch.pi * torch.arange(ATOMS - 2) / (ATOMS - 2)
    bipyramid = torch.cat(
        [torch.stack([ring.cos(), ring.sin(), 0 * ring], 1), torch.tensor([[0, 0, 0.6], [0, 0, -0.6]])]
    )
    positions = bipyramid.expand(n, ATOMS, 3)
    for _ in range(500):
        force = forces(lennard_jones, positions)[1].clamp(-50, 50)
        positions = positions + time_step * force + (2 * temperature * time_step) ** 0.5 * torch.randn_like(positions)
    return positions, *forces(lennard_jones, positions)


def molecular_dynamics(
    energy: Energy, positions: Tensor, velocities: Tensor, steps: int, time_step: float = 2e-3
) -> list[tuple[float, float, float, float]]:
    """Velocity Verlet with unit masses; rows of time, potential, total energy and the true total energy."""
    rows, (potential, force) = [], forces(energy, positions)
    for step in range(steps):
        kinetic = velocities.square().sum().item() / 2
        true = lennard_jones(positions).item()
        rows.append((step * time_step, potential.item(), potential.item() + kinetic, true + kinetic))
        velocities = velocities + time_step / 2 * force
        positions = positions + time_step * velocities
        potential, force = forces(energy, positions)
        velocities = velocities + time_step / 2 * force
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    positions, energies, true_forces = sampled(1024)
    test_positions, test_energies, test_forces = sampled(128)
    model = EnergyModel(ATOMS)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        batch = torch.randint(len(positions), (64,))
        energy, gradient = gpkernels.value_and_input_gradient(model, positions[batch])
        loss = (energy - energies[batch]).square().mean() / ATOMS**2 + (-gradient - true_forces[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 300 == 0 or step == options.steps - 1:
            energy, force = forces(model, test_positions)
            error, scale = (force - test_forces).abs().mean(), test_forces.abs().mean()
            energy_error = (energy - test_energies).abs().mean() / ATOMS
            print(f"step {step:4}  force error {error:.3f} of {scale:.3f}  energy error per atom {energy_error:.4f}")

    coldest = test_positions[test_energies.argmin()].unsqueeze(0)
    rows = molecular_dynamics(model, coldest, 0.3 * torch.randn_like(coldest), min(2000, 10 * options.steps))
    total = torch.tensor(rows, dtype=torch.float64)[:, 2]
    print(f"molecular dynamics: total energy {total.mean():.3f}, its deviation {total.std():.1e}")
    with (options.out / "force_field.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("time", "potential", "total", "true_total"), *rows])
    time, _, learnt, true = torch.tensor(rows).T
    plt.plot(time, learnt - learnt[0], label="learnt, which the dynamics conserves")
    plt.plot(time, true - true[0], label="Lennard-Jones, along the same path")
    plt.xlabel("time")
    plt.ylabel("total energy, less its first value")
    plt.legend()
    plt.savefig(options.out / "force_field.png")


if __name__ == "__main__":
    main()
