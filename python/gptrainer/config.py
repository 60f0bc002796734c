"""What a run is made of. Values left out take the papers' defaults for the algorithm and the data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from gptrainer.errors import UserError

T = TypeVar("T")

# What the papers and their public code use; width and steps are sized for two CPU cores.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "steps": 2000,
        "batch_size": 48,
        "betas": (0.0, 0.9),
        "penalty_weight": 10.0,
        "latent": 10,
        "width": 256,
    },
    "8gaussians": {
        "steps": 2000,
        "batch_size": 256,
        "betas": (0.5, 0.9),
        "penalty_weight": 0.1,
        "latent": 2,
        "width": 128,
    },
    "wgan": {"lr": 5e-5, "batch_size": 64},
    "wgan-gp": {"lr": 1e-4},
}

# A run may go on under other values of these; all others must be those of its checkpoint.
FREE_ON_RESUME = ("steps", "out", "resume", "device", "threads", "checkpoint_every")


def option(name: str, metavar: str, text: str, *aliases: str) -> Any:
    """How the command line shows a value whose default depends on the data or the algorithm."""
    known = [(choice, values[name]) for choice, values in DEFAULTS.items() if name in values]
    shown = [(choice, " ".join(map(str, v)) if isinstance(v, tuple) else v) for choice, v in known]
    defaults = ", ".join(f"{value} for {choice}" for choice, value in shown)
    return tyro.conf.arg(
        metavar=metavar, help=f"{text} (by default {defaults})", help_behavior_hint="", aliases=aliases
    )


@dataclass(frozen=True)
class TrainConfig:
    """Train a generative adversarial network and write samples, curves, metrics and weights."""

    algorithm: tyro.conf.Positional[Literal["wgan", "wgan-gp"]]
    """wgan: RMSprop and weight clipping; wgan-gp: Adam and the gradient penalty."""
    data: Literal["digits", "8gaussians"] = "digits"
    """Handwritten 8x8 digits, or a ring of eight Gaussians."""
    steps: Annotated[int | None, option("steps", "INT", "Generator steps")] = None
    batch_size: Annotated[int | None, option("batch_size", "INT", "Samples in a batch")] = None
    n_critic: int = 5
    """Critic steps for each generator step."""
    lr: Annotated[float | None, option("lr", "FLOAT", "Learning rate of both networks")] = None
    betas: Annotated[tuple[float, float] | None, option("betas", "FLOAT FLOAT", "Adam's, in wgan-gp")] = None
    penalty_weight: Annotated[
        float | None, option("penalty_weight", "FLOAT", "Weight of the gradient penalty, in wgan-gp", "--lambda")
    ] = None
    clip: float = 0.01
    """Bound of the critic's weights in wgan."""
    latent: Annotated[int | None, option("latent", "INT", "Size of the generator's input")] = None
    width: Annotated[int | None, option("width", "INT", "Size of the hidden layers")] = None
    seed: int = 0
    """The same seed and the same threads give the same run, bit for bit."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Run folder (by default runs/ALGORITHM-DATA)"""
    resume: bool = False
    """Go on from the checkpoint in the run folder."""
    device: str = "cpu"
    """A torch device, such as cpu or cuda."""
    threads: int = 1
    """Threads of the CPU; networks as small as these gain little from more, and lose much on a busy machine"""
    log_every: int = 10
    """Steps between two points of the critic's curves."""
    eval_every: int = 100
    """Steps between two measurements of sample quality."""
    checkpoint_every: int = 250
    """Steps between two checkpoints."""

    def complete(self) -> TrainConfig:
        """This run with every value filled in and checked; UserError names the option."""
        defaults = DEFAULTS[self.data] | DEFAULTS[self.algorithm]
        defaults["out"] = Path("runs") / f"{self.algorithm}-{self.data}"
        config = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        config._check()
        return config

    def settings(self) -> dict[str, Any]:
        """Plain values only, for a checkpoint and for JSON."""
        return asdict(self) | {"out": str(self.out), "betas": list(self.betas or ())}

    def _check(self) -> None:
        counts = ("steps", "batch_size", "n_critic", "latent", "width", "threads")
        for name in (*counts, "log_every", "eval_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, "a whole number above 0", getattr(self, name))
        _require(0 <= self.seed < 2**63, "seed", "a whole number from 0 to 2^63 - 1", self.seed)
        for name in ("lr", "clip"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, "a number above 0", value)
        weight = filled(self.penalty_weight)
        _require(math.isfinite(weight) and weight >= 0, "penalty_weight", "a number, 0 or more", weight)
        for beta in filled(self.betas):
            _require(0 <= beta < 1, "betas", "two numbers from 0 to below 1", beta)


def filled(value: T | None) -> T:
    """A value that ``complete`` has filled in."""
    assert value is not None
    return value


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {got}")
