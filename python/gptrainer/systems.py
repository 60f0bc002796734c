"""The systems: the options that each adds, and the values that the papers and their public code use."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from gpkernels.arguments import UserError
from gptrainer.config import SYSTEMS as SYSTEMS
from gptrainer.config import NetworkName, Norm, TrainConfig, arg
from gptrainer.models import NETWORKS, default_network

Betas = tuple[float, float]
Weight = Annotated[float, arg(aliases=("--lambda",))]
settings = dataclass(frozen=True, kw_only=True)


@settings
class AdamConfig(TrainConfig):
    """A system trained by Adam."""

    betas: Annotated[Betas, arg(metavar="FLOAT FLOAT")]
    """Adam's betas."""
    n_critic: int = 1


@settings
class DCGANConfig(AdamConfig):
    """A system trained as Radford et al. 2016 train image networks."""

    lr: float = 2e-4
    betas: Betas = (0.5, 0.999)


@settings
class GANConfig(DCGANConfig, algorithm="gan", generator_loss="saturating"):
    """Minimax game, whose generator gradient vanishes (Goodfellow et al. 2014)."""

    critic_norm: Norm = "batch"


@settings
class NSGANConfig(GANConfig, algorithm="nsgan", generator_loss="nonsaturating"):
    """Non-saturating game: the generator minimises -log D (Goodfellow et al. 2014)."""


@settings
class NoisyGANConfig(GANConfig, algorithm="gan-noise"):
    """Minimax with noise on real and generated samples that falls to 0 (Sønderby et al. 2017)."""

    noise: float
    """Standard deviation of the noise in the first step."""
    noise_steps: int = 0
    """Steps over which the noise falls to 0; 0 for --steps."""
    follows: ClassVar[dict[str, str]] = {**GANConfig.follows, "noise_steps": "steps"}


@settings
class HingeConfig(GANConfig, algorithm="hinge", objective="hinge", generator_loss="wgan"):
    """Hinge loss of the critic's scores (Lim and Ye 2017)."""


@settings
class LSGANConfig(GANConfig, algorithm="lsgan", objective="least-squares", generator_loss="least-squares"):
    """Least squares, with targets 1 and 0 for the critic's scores (Mao et al. 2017)."""


@settings
class WGANConfig(TrainConfig, algorithm="wgan", objective="wgan", generator_loss="wgan"):
    """RMSprop, weights clipped after each step (Arjovsky et al. 2017)."""

    lr: float = 5e-5
    batch_size: int = 64
    n_critic: int = 5
    critic_norm: Norm = "batch"
    clip: float = 0.01
    """Bound of the critic's weights."""


@settings
class WGANGPConfig(AdamConfig, algorithm="wgan-gp", objective="wgan", generator_loss="wgan", terms=("penalty",)):
    """Adam and a gradient penalty, two- or one-sided (Gulrajani et al. 2017)."""

    lr: float = 1e-4
    n_critic: int = 5
    penalty_weight: Weight
    """Weight of the gradient penalty."""
    one_sided: bool = False
    """Penalise only gradient norms above 1."""

    def loss_options(self) -> dict[str, Any]:
        return {"penalty_weight": self.penalty_weight, "one_sided": self.one_sided}


@settings
class CTGANConfig(WGANGPConfig, algorithm="ct-gan", terms=("penalty", "consistency")):
    """WGAN-GP with a consistency term between two dropout passes (Wei et al. 2018)."""

    network: NetworkName = "ct"
    consistency_weight: float = 2.0
    """Weight of the consistency term, lambda_2."""
    consistency_margin: float = 0.0
    """Inconsistency that is not penalised, M."""

    def loss_options(self) -> dict[str, Any]:
        # As their code trains: lambda_2 max(0, (D' - D'')^2 + 0.1 mean_j (D_' - D_'')^2 - M/lambda_2).
        weight = self.consistency_weight
        margin = self.consistency_margin / weight if weight else 0.0
        return {**super().loss_options(), "consistency_weight": weight, "consistency_margin": margin}


@settings
class R1Config(AdamConfig, algorithm="r1", penalties=("r1",), terms=("penalty",)):
    """Non-saturating game with a zero-centred penalty on real data (Mescheder et al. 2018)."""

    # The paper uses RMSprop with alpha .99: Adam with these betas, but for its bias correction.
    lr: float = 1e-4
    betas: Betas = (0.0, 0.99)
    ema: float = 0.999
    gamma: float = 10.0
    """Weight of the penalty, gamma/2 E |grad D|^2."""
    lazy: int = 1
    """Critic steps from one penalty to the next; StyleGAN2 uses 16."""

    def loss_options(self) -> dict[str, Any]:
        penalty = dict.fromkeys(self.penalties, self.gamma / 2)
        return {"objective": self.objective, "penalty": penalty, "penalty_every": self.lazy}


@settings
class R2Config(R1Config, algorithm="r2", penalties=("r2",)):
    """Non-saturating game with a zero-centred penalty on generated data (Mescheder et al. 2018)."""


@settings
class R3GANConfig(R1Config, algorithm="r3gan", objective="relativistic", penalties=("r1", "r2")):
    """Relativistic game with zero-centred penalties on real and generated data (Huang et al. 2024)."""

    # The paper's first values for CIFAR-10, which it then lets fall.
    lr: float = 2e-4
    generator_batch_size: int = 0
    """Samples in a generator batch: those of --batch-size, as each is scored beside a real one."""
    gamma: float = 0.05
    """Weight of both penalties, gamma/2 E |grad D|^2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolved("generator_batch_size") != self.batch_size:
            got = f"{self.generator_batch_size}, with {self.batch_size} real ones"
            raise UserError(f"--generator-batch-size: expected a generated sample for each real one, got {got}")


@settings
class DRAGANConfig(DCGANConfig, algorithm="dragan", terms=("penalty",)):
    """Non-saturating game with a gradient penalty around real data (Kodali et al. 2017)."""

    penalty_weight: Weight = 10.0
    """Weight of the gradient penalty."""
    scale: float = 0.5
    """Distance from the data at which gradients are penalised, in standard deviations of the data."""

    def loss_options(self) -> dict[str, Any]:
        weight, scale = self.penalty_weight, self.scale
        return {"objective": "gan", "penalty": "dragan", "penalty_weight": weight, "dragan_scale": scale}


@settings
class UnrolledConfig(DCGANConfig, algorithm="unrolled"):
    """Generator trained against the critic some steps ahead (Metz et al. 2017)."""

    lr: float = 1e-4
    generator_lr: float = 1e-3
    unroll: int = 5
    """Critic steps that the generator's loss looks ahead."""


@settings
class SemiSupervisedConfig(DCGANConfig, algorithm="ssl-ct-gan", terms=("labelled_loss", "consistency")):
    """Critic that classifies from few labels (Wei et al. 2018, Salimans et al. 2016)."""

    network: NetworkName = "semi-supervised"
    latent: int = NETWORKS["semi-supervised"].latent
    width: int = NETWORKS["semi-supervised"].width
    lr: float = 3e-3
    batch_size: int = 100
    ema: float = 0.9999
    consistency_weight: float = 0.1
    """Weight of the consistency term, lambda_2."""
    labels_per_class: int = 10
    """Labelled images of each class; the others are used without their labels."""


# Width and steps are sized for two CPU cores; the noise, which no paper fixes, for the distance of the modes.
TOY = {"steps": 2000, "batch_size": 256, "betas": (0.5, 0.9), "penalty_weight": 0.1, "width": 128}
IMAGES = {"betas": (0.0, 0.9), "penalty_weight": 10.0, "noise": 0.3}
PLANE = {**TOY, "latent": 2, "noise": 0.5}
DCGAN = {**IMAGES, "steps": 20_000, "batch_size": 64, "latent": 128, "width": 64}
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("8gaussians", "25gaussians", "swissroll", "ring", "lines"), PLANE),
    "dirac": {**TOY, "latent": 1, "noise": 1.0},
    "digits": {**IMAGES, "steps": 2000, "batch_size": 48, "latent": 10, "width": 256},
    "fashion-mnist": {**DCGAN, "batch_size": 50},
    # The residual networks of Gulrajani et al. 2017: Adam at 2e-4, falling to 0.
    "cifar10": {**DCGAN, "steps": 100_000, "width": 128, "generator_batch_size": 128},
    "folder": DCGAN,
    "folder32": DCGAN,
}
# Where a paper has values of its own for a system on a data set, or the size of a data set asks for them.
RING = {"network": "unrolled", "batch_size": 512, "latent": 256}
MILD = {"gamma": 0.1, "lr": 1e-3}  # modes are hundredths wide here: the paper's 10 keeps the critic flat
IN_THE_PLANE = ("8gaussians", "25gaussians", "swissroll", "ring")
RESIDUAL = {"network": "resnet", "lr": 2e-4, "decay_steps": 100_000}
PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    **{("unrolled", data): RING for data in IN_THE_PLANE},
    **{(algorithm, data): MILD for algorithm in ("r1", "r2", "r3gan") for data in IN_THE_PLANE},
    ("wgan-gp", "cifar10"): RESIDUAL,
    ("ct-gan", "cifar10"): {**RESIDUAL, "network": "ct-resnet"},
    # 14 steps an epoch, where the paper's 1e-4 would average over 700 epochs; 397 digits are left for evaluation.
    ("ssl-ct-gan", "digits"): {"ema": 0.999, "limit": 1400},
}


def configure(algorithm: str, data: str = "digits", **values: Any) -> TrainConfig:
    """Build the options of a system on a data set; UserError names an option that is out of range.

    An option that is absent or None gets the value for the system on this data, then the system's own, then the data's.
    A network other than the default comes with its own sizes.
    """
    system = SYSTEMS[algorithm]
    given = {name: value for name, value in values.items() if value is not None}
    own = set().union(*(vars(base) for base in system.mro() if issubclass(base, TrainConfig) and base != TrainConfig))
    common = {"network": default_network(data), "out": Path("runs") / f"{algorithm}-{data}", **DATA_DEFAULTS[data]}
    defaults = {name: value for name, value in common.items() if name not in own} | PAIRS.get((algorithm, data), {})
    usual = {**vars(system), **defaults}["network"]
    chosen = given.get("network", usual)
    if chosen != usual:
        defaults |= {"latent": NETWORKS[chosen].latent, "width": NETWORKS[chosen].width}
    names = {field.name for field in fields(system)}
    return system(data=data, **{name: value for name, value in defaults.items() if name in names} | given)
