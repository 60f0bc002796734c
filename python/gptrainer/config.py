"""Options of a run: those that every system shares, their help texts and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from gpkernels.arguments import UserError
from gptrainer.data import DATASETS
from gptrainer.models import NETWORKS

try:
    from tyro.conf import arg as arg
except ImportError:  # the options can be listed without it
    arg = dict

Data = Annotated[str, arg(metavar="DATA")]
NetworkName = Annotated[str, arg(metavar="NETWORK")]
Norm = Literal["none", "batch"]

# A resumed run may change these; all others must be those of its checkpoint.
FREE_ON_RESUME = ("steps", "out", "resume", "device", "threads", "checkpoint_every", "tensorboard", "data_dir")

Check = tuple[Callable[[Any], bool], str, tuple[str, ...]]
CHECKS: tuple[Check, ...] = (
    (DATASETS.__contains__, f"one of {', '.join(DATASETS)}", ("data",)),
    (NETWORKS.__contains__, f"one of {', '.join(NETWORKS)}", ("network",)),
    (lambda n: n >= 1, "an integer above 0", (
        "steps", "batch_size", "generator_batch_size", "n_critic", "latent", "width", "threads", "lazy", "unroll",
        "noise_steps", "labels_per_class", "limit", "log_every", "eval_every", "checkpoint_every",
    )),
    (lambda n: n >= 0, "an integer, 0 or more", ("decay_steps",)),
    (lambda n: 0 <= n < 2**63, "an integer from 0 to 2^63 - 1", ("seed",)),
    (lambda x: math.isfinite(x) and x > 0, "a number above 0", ("lr", "generator_lr", "clip")),
    (lambda x: math.isfinite(x) and x >= 0, "a number, 0 or more", (
        "penalty_weight", "gamma", "scale", "noise", "consistency_weight", "consistency_margin",
    )),
    (lambda x: 0 <= x < 1, "a number from 0 to below 1", ("ema",)),
    (lambda pair: all(0 <= x < 1 for x in pair), "two numbers from 0 to below 1", ("betas",)),
)  # fmt: skip


SYSTEMS: dict[str, type[TrainConfig]] = {}  # by name; ``gptrainer.systems`` defines them


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of every system. ``gptrainer.systems.configure`` supplies those without a default here."""

    algorithm: ClassVar[str]
    objective: ClassVar[str] = "gan"  # the adversarial part of the critic's loss
    generator_loss: ClassVar[str] = "nonsaturating"
    penalties: ClassVar[tuple[str, ...]] = ()  # zero-centred ones of the critic's loss
    terms: ClassVar[tuple[str, ...]] = ()  # parts of the critic's loss, beside the adversarial one, that get a curve

    def __init_subclass__(cls, **constants: Any) -> None:
        """Set class variables, and register a class that has a name as a system."""
        for name, value in constants.items():
            assert name in TrainConfig.__annotations__, name
            setattr(cls, name, value)
        if "algorithm" in constants:
            SYSTEMS[cls.algorithm] = cls

    data: Data
    """The data set; `gpkernels train --list` describes them."""
    data_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the data's files, where it has any."""
    limit: Annotated[int | None, arg(metavar="INT")] = None
    """Train on the first LIMIT images; where the data has no test images, the rest are held out."""
    network: NetworkName
    """The pair of networks; `gpkernels train --list` describes them."""
    critic_norm: Norm = "none"
    """Normalisation in DCGAN's critics."""
    steps: int
    """Generator steps."""
    batch_size: int
    """Samples in a batch, over all processes."""
    generator_batch_size: int = 0
    """Samples in a generator batch; 0 for --batch-size."""
    n_critic: int
    """Critic steps for each generator step."""
    critic_boost: bool = False
    """Take 100 critic steps in the first 25 generator steps and in every 500th, as in WGAN's code."""
    lr: float
    """Learning rate."""
    generator_lr: float = 0.0
    """The generator's learning rate; 0 for --lr."""
    decay_steps: int = 0
    """Steps over which the learning rates fall linearly to 0; 0 keeps them constant."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is evaluated in place of the weights; 0 for none."""
    latent: int
    """Size of the generator's input."""
    width: int
    """Width of the hidden layers."""
    seed: int = 0
    """The same seed and number of threads repeat a run bit for bit."""
    out: Annotated[Path, arg(metavar="PATH")]
    """Run folder."""
    resume: bool = False
    """Continue from the checkpoint in the run folder."""
    tensorboard: bool = False
    """Write scalars and images for TensorBoard to the run folder."""
    device: str = "cpu"
    """A torch device, such as cpu or cuda."""
    threads: int = 1
    """CPU threads; small networks gain little from more, and lose much on a busy machine."""
    log_every: int = 10
    """Steps between points of the critic's curves."""
    eval_every: int = 100
    """Steps between evaluations of sample quality."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    # Options for which 0 stands for the value of another one.
    follows: ClassVar[dict[str, str]] = {"generator_lr": "lr", "generator_batch_size": "batch_size"}

    def __post_init__(self) -> None:
        """Check the values; UserError names an option that is out of range."""
        for valid, expected, names in CHECKS:
            for name in names:
                value = getattr(self, name, None)
                if value is not None and not valid(value) and not (name in self.follows and value == 0):
                    raise UserError(f"{flag(name)}: expected {expected}, got {value}")

    def loss_options(self) -> dict[str, Any]:
        """Options of the critic's loss, a ``CriticLoss``."""
        return {"objective": self.objective, "penalty": "none"}

    def resolved(self, name: str) -> Any:
        """Value of an option, or of the one that it follows."""
        value = getattr(self, name)
        return getattr(self, self.follows[name]) if value == 0 and name in self.follows else value

    def settings(self) -> dict[str, Any]:
        """The options as JSON values, for checkpoints and metrics."""
        values = {field.name: self.resolved(field.name) for field in fields(self)}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        return {"algorithm": self.algorithm, **plain}


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"
