"""Measure whole training steps of published programs, beside the same steps by the papers' formulas in plain PyTorch.

    .venv/bin/python bench/programs.py [--program NAME] [--seconds N] [--device D] [--csv FILE]

Losses are the papers', networks and batches have the sizes of their code; each step ends with Adam's. Both sides begin
with the same weights and noise, and their losses are compared over two steps before anything is timed. Times are the
minimum CPU time on one thread, interleaved; on a GPU, the time until it is done. Further programs are in the files
programs_*.py beside this one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable
from importlib import import_module
from math import pi
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpkernels as gpk
from gpkernels.bench import machine
from gpkernels.zoo import SkipField, mlp

Step = Callable[[], Tensor]  # gives the loss
Loss = Callable[..., Tensor]
COLUMNS = ("program", "eager_ms", "gpkernels_ms", "eager_over_gpkernels")


def optimised(module: nn.Module, loss: Step, learning_rate: float = 1e-4) -> Step:
    """Return a step of Adam on a loss."""
    optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate, betas=(0.5, 0.9))

    def step() -> Tensor:
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        return value.detach()

    return step


def slope(output: Tensor, x: Tensor) -> Tensor:
    """Return the gradient at x, to be differentiated again."""
    return torch.autograd.grad(output.sum(), x, create_graph=True)[0]


# --- Gulrajani et al. 2017, toy data: five critic steps and a generator step ------------------------------------------


def wgan_gp(n: int = 256, weight: float = 0.1, critic_steps: int = 5) -> tuple[Step, Step]:
    """MLP 2-512x3-1, λ 0.1."""
    critic, generator = mlp(2, 512, 512, 512, 1), mlp(2, 512, 512, 512, 2)
    real = torch.randn(n, 2)

    def plain(critic: nn.Module) -> Loss:
        def loss(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
            on_fake, on_real = critic(fake), critic(real)
            x = (eps * real + (1 - eps) * fake).requires_grad_()
            norm = slope(critic(x), x).norm(2, dim=1)
            return on_fake.mean() - on_real.mean() + weight * (norm - 1).square().mean()

        return loss

    def ours(critic: nn.Module) -> Loss:
        critic_loss = gpk.CriticLoss(critic, penalty_weight=weight)
        return lambda real, fake, eps: critic_loss(real, fake, eps=eps).loss

    def iteration(loss_of: Callable[[nn.Module], Loss]) -> Step:
        mine, maker = copy.deepcopy(critic), copy.deepcopy(generator)
        critic_loss = loss_of(mine)

        def loss() -> Tensor:
            with torch.no_grad():
                fake = maker(torch.randn(n, 2))
            return critic_loss(real, fake, torch.rand(n, 1))

        critic_step = optimised(mine, loss)
        generator_step = optimised(maker, lambda: -mine(maker(torch.randn(n, 2))).mean())

        def step() -> Tensor:
            losses = [critic_step() for _ in range(critic_steps)]
            return losses[-1] + generator_step()

        return step

    return iteration(ours), iteration(plain)


# --- Huang et al. 2024 (R3GAN) ----------------------------------------------------------------------------------------


class BiasedActivation(nn.Module):
    """LeakyReLU of x plus a trained bias for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias.view(1, -1, 1, 1), 0.2)


class Block(nn.Module):
    """Residual block of R3GAN: 1 x 1 to twice the channels, grouped 3 x 3, 1 x 1 back."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            BiasedActivation(wide),
            nn.Conv2d(wide, wide, 3, padding=1, groups=groups, bias=False),
            BiasedActivation(wide),
            nn.Conv2d(wide, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def r3gan(n: int, channels: int = 64, groups: int = 16, gamma: float = 1.0) -> tuple[Step, Step]:
    """Critic of four stages from 32 to 4 px, its step alone."""
    stages: list[nn.Module] = [nn.Conv2d(3, channels, 1, bias=False), Block(channels, groups)]
    for _ in range(3):
        stages += [nn.AvgPool2d(2), Block(channels, groups)]
    head = [nn.Conv2d(channels, channels, 4, groups=channels, bias=False), nn.Flatten(), nn.Linear(channels, 1)]
    critic = nn.Sequential(*stages, *head)
    real, fake = torch.randn(2, n, 3, 32, 32)

    def plain(critic: nn.Module) -> Tensor:
        x, y = real.clone().requires_grad_(), fake.clone().requires_grad_()
        on_real, on_fake = critic(x), critic(y)
        r1, r2 = (slope(score, at).square().sum((1, 2, 3)) for score, at in ((on_real, x), (on_fake, y)))
        return (F.softplus(on_fake - on_real).squeeze(1) + gamma / 2 * (r1 + r2)).mean()

    mine, theirs = copy.deepcopy(critic), critic
    critic_loss = gpk.CriticLoss(mine, objective="relativistic", penalty={"r1": gamma / 2, "r2": gamma / 2})
    return optimised(mine, lambda: critic_loss(real, fake).loss), optimised(theirs, lambda: plain(theirs))


# --- Xu et al. 2019 (CTGAN) -------------------------------------------------------------------------------------------


class PackedCritic(nn.Module):
    """CTGAN's critic 256-256 of packs, dropout 0.5."""

    def __init__(self, columns: int, pack: int) -> None:
        super().__init__()
        self.width = pack * columns
        sizes = ((self.width, 256), (256, 256))
        hidden = [layer for s in sizes for layer in (nn.Linear(*s), nn.LeakyReLU(0.2), nn.Dropout(0.5))]
        self.net = nn.Sequential(*hidden, nn.Linear(256, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, self.width))


def ctgan(n: int = 500, columns: int = 100, pack: int = 10) -> tuple[Step, Step]:
    """Critic 256-256 of packs of ten rows, its step alone; each side draws its dropout."""
    critic = PackedCritic(columns, pack)
    real, fake = torch.randn(2, n, columns)

    def plain(critic: nn.Module, eps: Tensor) -> Tensor:
        on_fake, on_real = critic(fake), critic(real)
        eps = eps.repeat_interleave(pack, 0)
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        norm = slope(critic(x), x).view(-1, pack * columns).norm(2, dim=1)
        return on_fake.mean() - on_real.mean() + 10 * (norm - 1).square().mean()

    mine, theirs = copy.deepcopy(critic), critic
    critic_loss = gpk.CriticLoss(mine, pack=pack)
    draw = lambda: torch.rand(n // pack, 1)  # noqa: E731
    return (
        optimised(mine, lambda: critic_loss(real, fake, eps=draw()).loss),
        optimised(theirs, lambda: plain(theirs, draw())),
    )


# --- Gropp et al. 2020 (IGR), Sitzmann et al. 2020 (SIREN) ------------------------------------------------------------


def igr(n: int) -> tuple[Step, Step]:
    """Softplus field 3-512x8-1 with a skip; n points on the surface with normals, 9/8 n off it."""
    field = SkipField(512)
    on, off = torch.rand(n, 3) - 0.5, torch.rand(n * 9 // 8, 3) - 0.5
    normals = F.normalize(torch.randn(n, 3), dim=1)

    def plain(field: nn.Module) -> Tensor:
        x, y = on.clone().requires_grad_(), off.clone().requires_grad_()
        value, away = field(x), field(y)
        gradient, gradient_away = slope(value, x), slope(away, y)
        eikonal = (gradient_away.norm(2, dim=1) - 1).square().mean()
        return value.abs().mean() + 0.1 * eikonal + (gradient - normals).norm(2, dim=1).mean()

    def ours(field: nn.Module) -> Tensor:
        value, gradient = gpk.value_and_input_gradient(field, on)
        eikonal = gpk.eikonal_loss(field, off)
        return value.abs().mean() + 0.1 * eikonal + (gradient - normals).norm(2, dim=1).mean()

    mine, theirs = copy.deepcopy(field), field
    return optimised(mine, lambda: ours(mine)), optimised(theirs, lambda: plain(theirs))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def siren(n: int = 1024, width: int = 256) -> tuple[Step, Step]:
    """SIREN 2-256x4-1, eq. 6 at n points on the curve and n off it, which go as one batch."""
    field = mlp(2, *[width] * 4, 1, activation=Sine)
    for i, layer in enumerate(field):
        if isinstance(layer, nn.Linear):
            bound = 1 / 2 if i == 0 else (6 / width) ** 0.5 / 30
            nn.init.uniform_(layer.weight, -bound, bound)
    angle = 2 * pi * torch.rand(n)
    normals = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.cat([0.5 * normals, 2 * torch.rand(n, 2) - 1])

    def rest(value: Tensor, gradient: Tensor) -> Tensor:
        alignment = (1 - F.cosine_similarity(gradient[:n], normals, dim=1)).mean()
        return 3e3 * value[:n].abs().mean() + 1e2 * alignment + 1e2 * torch.exp(-1e2 * value[n:].abs()).mean()

    def plain(field: nn.Module) -> Tensor:
        x = points.clone().requires_grad_()
        value = field(x)
        gradient = slope(value, x)
        return 50 * (gradient.norm(2, dim=1) - 1).abs().mean() + rest(value, gradient)

    def ours(field: nn.Module) -> Tensor:
        value, gradient = gpk.value_and_input_gradient(field, points)
        return 50 * gpk.gradient_norm_penalty(gradient, power=1) + rest(value, gradient)

    mine, theirs = copy.deepcopy(field), field
    return optimised(mine, lambda: ours(mine)), optimised(theirs, lambda: plain(theirs))


# Each entry makes (our step, the original formulas' step).
PROGRAMS: dict[str, Callable[[], tuple[Step, Step]]] = {
    "WGAN-GP toy, N 256": wgan_gp,
    "R3GAN critic, N 16": lambda: r3gan(16),
    "R3GAN critic, N 64": lambda: r3gan(64),
    "CTGAN critic, N 500": ctgan,
    "IGR, N 2048": lambda: igr(2048),
    "IGR, N 16384": lambda: igr(16384),
    "SIREN, N 2048": siren,
}


def programs() -> dict[str, Callable[[], tuple[Step, Step]]]:
    """Return the programs of this file and of the files programs_*.py beside it."""
    found = dict(PROGRAMS)
    for path in sorted(Path(__file__).parent.glob("programs_*.py")):
        found |= import_module(path.stem).PROGRAMS
    return found


def compare(name: str, steps: tuple[Step, Step]) -> None:
    """Raise unless both steps have the same losses twice, from the same seeds.

    From its third call on ``CriticLoss`` may process all samples as one batch, which draws other dropout masks.
    """
    for seed in range(2):
        losses = []
        for step in steps:
            torch.manual_seed(seed)
            losses.append(step())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")


def measured(steps: tuple[Step, Step], seconds: float) -> list[float]:
    """Return the milliseconds of each step: the minimum of at least three rounds, and for so many seconds."""
    best, rounds, end = [float("inf")] * 2, 0, time.perf_counter() + seconds
    now = _when_done if torch.get_default_device().type == "cuda" else time.process_time
    while rounds < 3 or time.perf_counter() < end:
        for i, step in enumerate(steps):
            start = now()
            step()
            best[i] = min(best[i], 1000 * (now() - start))
        rounds += 1
    return best


def _when_done() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    known = programs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", choices=known, help="measure this one (default: all)")
    parser.add_argument("--seconds", type=float, default=20, metavar="N", help="for each program (default: 20)")
    parser.add_argument("--device", default="cpu", metavar="D", help="where tensors are made (default: cpu)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    machine.keep_freed_memory()
    print(f"{'program':<32}  {'eager ms':>10}  {'ours ms':>10}  eager over ours")
    rows = []
    for name in options.program or known:
        torch.manual_seed(0)
        steps = known[name]()
        compare(name, steps)
        ours, eager = measured(steps, options.seconds)
        rows.append((name, round(eager, 3), round(ours, 3), round(eager / ours, 2)))
        print(f"{name:<32}  {eager:10.2f}  {ours:10.2f}  {eager / ours:15.2f}", flush=True)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
