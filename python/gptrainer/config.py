"""What a run is made of. Values left out take the papers' defaults for the algorithm and the data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from gptrainer.data import DATASETS
from gptrainer.defaults import DATA_DEFAULTS, PAIRS, SYSTEMS, TAKEN_BY, defaults_for
from gptrainer.errors import UserError
from gptrainer.models import NETWORKS

T = TypeVar("T")

if TYPE_CHECKING:
    Algorithm = str
    Data = str
    NetworkName = str
else:
    Algorithm = Literal[tuple(SYSTEMS)]
    Data = Literal[tuple(DATASETS)]
    NetworkName = Literal[tuple(NETWORKS)]

# A run may go on under other values of these; all others must be those of its checkpoint.
FREE_ON_RESUME = ("steps", "out", "resume", "device", "threads", "checkpoint_every", "tensorboard", "data_dir")


def option(name: str, metavar: str, text: str, *aliases: str) -> Any:
    """How the command line shows a value whose default depends on the data or the algorithm."""
    return tyro.conf.arg(metavar=metavar, help=text + _shown_defaults(name), help_behavior_hint="", aliases=aliases)


def chosen(metavar: str, text: str) -> Any:
    """How the command line shows one of a few names."""
    return tyro.conf.arg(metavar=metavar, help=text, help_behavior_hint="")


def switch(text: str) -> Any:
    """How the command line shows what is off unless it is named."""
    return tyro.conf.arg(help=text, help_behavior_hint="")


def _shown_defaults(name: str) -> str:
    """' (by default 1 for a, b; 2 for c)', or nothing where the text says it all."""
    tables = DATA_DEFAULTS | {algorithm: system.defaults for algorithm, system in SYSTEMS.items()}
    names_of: dict[str, list[str]] = {}
    for choice, values in tables.items():
        if name in values:
            names_of.setdefault(_shown_value(values[name]), []).append(choice)
    for (algorithm, data), values in PAIRS.items():
        if name in values:
            names_of.setdefault(_shown_value(values[name]), []).append(f"{algorithm} on {data}")
    listed = "; ".join(f"{shown} for {', '.join(_summed_up(names))}" for shown, names in names_of.items())
    return f" (by default {listed})" if listed else ""


def _shown_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def _summed_up(names: list[str]) -> list[str]:
    """The same with "points" for all data sets of points in the plane, and "images" for all of images."""
    for kind in ("points", "images"):
        all_of_kind = {data for data, known in DATASETS.items() if known.kind == kind and known.shape != (1,)}
        for before in ("", *(f"{algorithm} on " for algorithm in SYSTEMS)):
            members = {before + data for data in all_of_kind - ({"lines"} if before else set())}
            if members <= set(names):
                names = [before + kind, *(name for name in names if name not in members)]
    return names


@dataclass(frozen=True)
class TrainConfig:
    """Train a generative adversarial network and write samples, curves, metrics and weights.

    `gpkernels train --list` says in a line what each system, each data set and each network is.
    """

    algorithm: Annotated[tyro.conf.Positional[Algorithm], chosen("SYSTEM", f"What to train: {', '.join(SYSTEMS)}")]
    data: Annotated[Data, chosen("DATA", f"What to train on (by default digits): {', '.join(DATASETS)}")] = "digits"
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Folder of the data's files, where it has any"""
    limit: Annotated[
        int | None,
        option("limit", "INT", "Train on the first so many images; where there are no others, hold out the rest"),
    ] = None
    network: Annotated[
        NetworkName | None,
        chosen("NETWORK", f"The networks (by default the papers' for the data): {', '.join(NETWORKS)}"),
    ] = None
    critic_norm: Annotated[
        Literal["none", "batch"] | None,
        chosen("none|batch", "What DCGAN's critics normalise by (by default none where a penalty is taken)"),
    ] = None
    steps: Annotated[int | None, option("steps", "INT", "Generator steps")] = None
    batch_size: Annotated[int | None, option("batch_size", "INT", "Samples in a batch, of all processes together")] = (
        None
    )
    generator_batch_size: Annotated[
        int | None, option("generator_batch_size", "INT", "The generator's, where it differs from --batch-size")
    ] = None
    n_critic: Annotated[int | None, option("n_critic", "INT", "Critic steps for each generator step")] = None
    critic_boost: Annotated[
        bool, switch("100 critic steps in the first 25 generator steps and in every 500th, as in WGAN's code")
    ] = False
    lr: Annotated[float | None, option("lr", "FLOAT", "Learning rate")] = None
    generator_lr: Annotated[
        float | None, option("generator_lr", "FLOAT", "The generator's, where it differs from --lr")
    ] = None
    decay_steps: Annotated[
        int | None, option("decay_steps", "INT", "Steps over which the learning rates fall linearly to 0; 0 keeps them")
    ] = None
    betas: Annotated[tuple[float, float] | None, option("betas", "FLOAT FLOAT", "Adam's")] = None
    penalty_weight: Annotated[
        float | None, option("penalty_weight", "FLOAT", "Weight of the gradient penalty, lambda", "--lambda")
    ] = None
    one_sided: Annotated[bool, switch("wgan-gp, ct-gan: penalise only gradient norms above 1")] = False
    scale: Annotated[
        float | None, option("scale", "FLOAT", "How far from the data dragan penalises, in deviations of the data")
    ] = None
    gamma: Annotated[float | None, option("gamma", "FLOAT", "r1, r2: the penalty is gamma/2 E |grad D|^2")] = None
    lazy: Annotated[
        int | None, option("lazy", "INT", "r1, r2: critic steps from one penalty to the next, 16 in StyleGAN2")
    ] = None
    clip: Annotated[float | None, option("clip", "FLOAT", "Bound of the critic's weights")] = None
    noise: Annotated[float | None, option("noise", "FLOAT", "gan-noise: its deviation at the start")] = None
    noise_steps: Annotated[
        int | None, option("noise_steps", "INT", "gan-noise: steps over which it falls to 0 (by default all)")
    ] = None
    consistency_weight: Annotated[
        float | None, option("consistency_weight", "FLOAT", "Weight of the consistency term, lambda_2")
    ] = None
    consistency_margin: Annotated[
        float | None, option("consistency_margin", "FLOAT", "What the consistency term allows, M")
    ] = None
    unroll: Annotated[int | None, option("unroll", "INT", "Critic steps that the generator looks ahead")] = None
    labels_per_class: Annotated[
        int | None, option("labels_per_class", "INT", "Labelled images of each class; the others go without")
    ] = None
    ema: Annotated[
        float | None,
        option("ema", "FLOAT", "Decay of a moving average of the weights, which is then what is measured; 0 for none"),
    ] = None
    latent: Annotated[int | None, option("latent", "INT", "Size of the generator's input")] = None
    width: Annotated[int | None, option("width", "INT", "Size of the hidden layers")] = None
    seed: int = 0
    """The same seed and the same threads give the same run, bit for bit."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Run folder (by default runs/ALGORITHM-DATA)"""
    resume: Annotated[bool, switch("Go on from the checkpoint in the run folder")] = False
    tensorboard: Annotated[bool, switch("Write scalars and images for TensorBoard into the run folder")] = False
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
        for name, takers in TAKEN_BY.items():
            if self.algorithm not in takers and getattr(self, name) not in (None, False):
                raise UserError(f"{_flag(name)}: expected only with {_joined(takers)}, got it with {self.algorithm}")
        values: dict[str, Any] = {"ema": 0.0, "decay_steps": 0, "critic_norm": "none"}
        values |= defaults_for(self.algorithm, self.data, self.network)
        values["out"] = Path("runs") / f"{self.algorithm}-{self.data}"
        config = replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})
        follows: dict[str, Any] = {"generator_lr": config.lr, "generator_batch_size": config.batch_size}
        if config.algorithm in TAKEN_BY["noise_steps"]:
            follows["noise_steps"] = config.steps
        config = replace(config, **{name: value for name, value in follows.items() if getattr(config, name) is None})
        config._check()
        return config

    def settings(self) -> dict[str, Any]:
        """Plain values only, for a checkpoint and for JSON."""
        return asdict(self) | {
            "out": str(self.out),
            "data_dir": None if self.data_dir is None else str(self.data_dir),
            "betas": list(self.betas or ()),
        }

    def _check(self) -> None:
        counts: tuple[str, ...] = (
            "steps", "batch_size", "generator_batch_size", "n_critic", "latent", "width", "threads",
            "lazy", "unroll", "noise_steps", "labels_per_class", "limit", "log_every", "eval_every", "checkpoint_every",
        )  # fmt: skip
        self._require(counts, lambda n: n >= 1, "a whole number above 0")
        self._require(("decay_steps",), lambda n: n >= 0, "a whole number, 0 or more")
        self._require(("seed",), lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
        self._require(("lr", "generator_lr", "clip"), lambda x: math.isfinite(x) and x > 0, "a number above 0")
        weights = ("penalty_weight", "gamma", "scale", "noise", "consistency_weight", "consistency_margin")
        self._require(weights, lambda x: math.isfinite(x) and x >= 0, "a number, 0 or more")
        self._require(("ema",), lambda x: 0 <= x < 1, "a number from 0 to below 1")
        self._require(("betas",), lambda pair: all(0 <= x < 1 for x in pair), "two numbers from 0 to below 1")

    def _require(self, names: tuple[str, ...], holds: Any, expected: str) -> None:
        """UserError for the first of the values that there are and that do not hold."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"{_flag(name)}: expected {expected}, got {value}")


def filled(value: T | None) -> T:
    """A value that ``complete`` has filled in."""
    assert value is not None
    return value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _joined(names: set[str]) -> str:
    return " or ".join(name for name in SYSTEMS if name in names)
