"""A WGAN-GP of text: critic and generator of characters, on the docstrings of Python's standard library.

Formulas (Gulrajani et al. 2017, algorithm 1 and section 5.4, "character-level language modeling"):

    L(D) = E D(G(z)) - E D(x) + 10 E (|grad D(x^)| - 1)^2,  x^ between x and G(z);   L(G) = -E D(G(z))

A real line is rows of one-hot characters, a generated one is rows of a softmax: the critic sees both as they are, and
the generator learns through the softmax, without sampling. Both networks are residual, of convolutions along the line.
Printed are the Jensen-Shannon divergences between n-grams of samples and of the text, which the paper plots.

    python examples/language.py --out out    # about a minute; writes language.csv and language.txt
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpkernels

MODULES = (
    "argparse collections csv datetime decimal functools json logging os random re shutil statistics string typing"
)
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
LENGTH, CHANNELS, CRITIC_STEPS, BATCH = 12, 48, 5, 32


def docstrings() -> str:
    """Join the docstrings of some modules and of what they define: words in lower case."""
    found: dict[str, None] = {}
    for module in map(importlib.import_module, MODULES.split()):
        members = [value for name, value in sorted(vars(module).items()) if not name.startswith("_")]
        methods = [method for value in members if inspect.isclass(value) for method in vars(value).values()]
        documented = [value for value in [module, *members, *methods] if callable(value) or inspect.ismodule(value)]
        found |= dict.fromkeys(inspect.getdoc(value) or "" for value in documented)
    return re.sub("[^a-z]+", " ", " ".join(found).lower())


def lines_of(text: str) -> Tensor:
    """Indices of the characters of every line that begins with a word, (lines, LENGTH)."""
    indices = torch.tensor([ALPHABET.index(character) for character in text])
    return torch.stack([indices[m.start() : m.start() + LENGTH] for m in re.finditer(r"\b\w", text[:-LENGTH])])


def text_of(rows: Tensor) -> list[str]:
    return ["".join(ALPHABET[i] for i in row) for row in rows.tolist()]


class ResidualBlock(nn.Module):
    """x + 0.3 f(x), where f is two convolutions of five characters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv1d(channels, channels, 5, padding=2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.conv2(F.relu(self.conv1(F.relu(x))))


class Critic(nn.Module):
    """Maps lines (N, length, characters) to scores (N, 1)."""

    def __init__(self, channels: int, length: int = LENGTH, blocks: int = 3) -> None:
        super().__init__()
        residual = [ResidualBlock(channels) for _ in range(blocks)]
        self.body = nn.Sequential(nn.Conv1d(len(ALPHABET), channels, 1), *residual, nn.Flatten())
        self.top = nn.Linear(length * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(x.transpose(1, 2)))


class Generator(nn.Module):
    """Maps noise (N, 128) to lines, whose rows are probabilities of characters."""

    def __init__(self, channels: int, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(128, LENGTH * channels)
        residual = [ResidualBlock(channels) for _ in range(blocks)]
        self.body = nn.Sequential(*residual, nn.Conv1d(channels, len(ALPHABET), 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.first(z).view(len(z), -1, LENGTH)).transpose(1, 2).softmax(-1)


def shares(lines: list[str], n: int) -> dict[str, float]:
    """Relative frequencies of the n-grams."""
    counts = Counter(line[i : i + n] for line in lines for i in range(LENGTH - n + 1))
    return {gram: count / counts.total() for gram, count in counts.items()}


def divergence(p: dict[str, float], q: dict[str, float]) -> float:
    """Jensen-Shannon divergence in nats."""
    middle = {gram: (p.get(gram, 0) + q.get(gram, 0)) / 2 for gram in p | q}
    return sum(share * math.log(share / middle[gram]) for side in (p, q) for gram, share in side.items()) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the generator")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    lines = lines_of(docstrings())
    real_shares = [shares(text_of(lines), n) for n in (1, 2, 3)]
    critic, generator = Critic(CHANNELS), Generator(CHANNELS)
    critic_loss = gpkernels.CriticLoss(critic)  # WGAN-GP with a weight of 10
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.9))
    generator_optimizer = torch.optim.Adam(generator.parameters(), 1e-3, (0.5, 0.9))
    rows = []
    for step in range(options.steps):
        for _ in range(CRITIC_STEPS):
            real = F.one_hot(lines[torch.randint(len(lines), (BATCH,))], len(ALPHABET)).float()
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, 128))
            parts = critic_loss(real, fake)
            critic_optimizer.zero_grad()
            parts.loss.backward()
            critic_optimizer.step()
        generator_optimizer.zero_grad()
        gpkernels.wgan_generator_loss(critic(generator(torch.randn(BATCH, 128)))).backward()
        generator_optimizer.step()

        if step % 50 == 0 or step == options.steps - 1:
            with torch.no_grad():
                samples = text_of(generator(torch.randn(512, 128)).argmax(-1))
            divergences = [divergence(shares(samples, n), real) for n, real in enumerate(real_shares, 1)]
            rows.append((step, -parts.adversarial.item(), *divergences))
            print("step {}  distance {:.2f}  divergence of 1-, 2-, 3-grams {:.3f} {:.3f} {:.3f}".format(*rows[-1]))
    print(" | ".join(samples[:12]))
    (options.out / "language.txt").write_text("\n".join(samples), encoding="utf-8")
    with (options.out / "language.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "distance", "js1", "js2", "js3"), *rows])


if __name__ == "__main__":
    main()
