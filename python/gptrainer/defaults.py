"""The systems and data sets by name, and the values that the papers and their public code use."""

from __future__ import annotations

from typing import Any, NamedTuple

from gptrainer.models import NETWORKS, default_network


class Named(NamedTuple):
    """A line for the list of what there is, and the values that come with it."""

    summary: str
    defaults: dict[str, Any]


# Radford et al. 2016: what the image networks of the first years were trained with.
DCGAN_ADAM = {"lr": 2e-4, "betas": (0.5, 0.999), "n_critic": 1}
NORMALISED = {"critic_norm": "batch"}
LOGISTIC = DCGAN_ADAM | NORMALISED
# Mescheder et al. 2018 use RMSprop with alpha .99: Adam with these betas, but for its bias correction.
R1_ADAM = {"lr": 1e-4, "betas": (0.0, 0.99), "n_critic": 1}
CONSISTENCY = {"consistency_weight": 2.0, "consistency_margin": 0.0}

SYSTEMS = {
    "gan": Named(
        "the minimax game, whose generator gradient vanishes (Goodfellow et al. 2014)", DCGAN_ADAM | NORMALISED
    ),
    "nsgan": Named("the generator minimises -log D instead (Goodfellow et al. 2014)", DCGAN_ADAM | NORMALISED),
    "gan-noise": Named(
        "minimax, with noise on real and fake that falls to 0 (Arjovsky and Bottou 2017, Sønderby et al. 2017)",
        LOGISTIC,
    ),
    "wgan": Named(
        "RMSprop, weights clipped after each step (Arjovsky et al. 2017)",
        {"lr": 5e-5, "batch_size": 64, "clip": 0.01, "n_critic": 5, **NORMALISED},
    ),
    "wgan-gp": Named(
        "Adam and a gradient penalty, two- or one-sided (Gulrajani et al. 2017)", {"lr": 1e-4, "n_critic": 5}
    ),
    "ct-gan": Named(
        "wgan-gp and a consistency term between two dropout passes (Wei et al. 2018)",
        {"lr": 1e-4, "n_critic": 5, **CONSISTENCY},
    ),
    "r1": Named(
        "nsgan with a zero-centred penalty at real data (Mescheder et al. 2018)",
        {**R1_ADAM, "gamma": 10.0, "lazy": 1, "ema": 0.999},
    ),
    "r2": Named(
        "nsgan with a zero-centred penalty at generated data (Mescheder et al. 2018)",
        {**R1_ADAM, "gamma": 10.0, "lazy": 1, "ema": 0.999},
    ),
    "dragan": Named(
        "nsgan with a gradient penalty around real data (Kodali et al. 2017)",
        {**DCGAN_ADAM, "penalty_weight": 10.0, "scale": 0.5},
    ),
    "unrolled": Named(
        "the generator looks some critic steps ahead (Metz et al. 2017)",
        {"lr": 1e-4, "generator_lr": 1e-3, "betas": (0.5, 0.999), "n_critic": 1, "unroll": 5},
    ),
    "ssl-ct-gan": Named(
        "a classifier of few labels and many images as the critic (Wei et al. 2018, Salimans et al. 2016)",
        {
            "lr": 3e-3,
            "betas": (0.5, 0.999),
            "n_critic": 1,
            "batch_size": 100,
            "consistency_weight": 0.1,
            "labels_per_class": 10,
            "ema": 0.9999,
        },
    ),
}

# Width and steps are sized for two CPU cores; noise, which no paper fixes, for the distance between modes.
TOY = {"steps": 2000, "batch_size": 256, "betas": (0.5, 0.9), "penalty_weight": 0.1, "width": 128}
IMAGES = {"betas": (0.0, 0.9), "penalty_weight": 10.0, "noise": 0.3}
PLANE = {**TOY, "latent": 2, "noise": 0.5}
DCGAN = {**IMAGES, "steps": 20_000, "batch_size": 64, "latent": 128, "width": 64}
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "8gaussians": PLANE,
    "25gaussians": PLANE,
    "swissroll": PLANE,
    "ring": PLANE,
    "lines": PLANE,
    "dirac": {**TOY, "latent": 1, "noise": 1.0},
    "digits": {**IMAGES, "steps": 2000, "batch_size": 48, "latent": 10, "width": 256},
    "fashion-mnist": {**DCGAN, "batch_size": 50},
    # The residual networks of Gulrajani et al. 2017: Adam at 2e-4, falling to 0.
    "cifar10": {**DCGAN, "steps": 100_000, "width": 128, "generator_batch_size": 128},
    "folder": DCGAN,
    "folder32": DCGAN,
}
# Where a paper has a value of its own for a system on a data set, or the size of a data set asks for one.
RING = {"batch_size": 512, "latent": 256}
MILD = {"gamma": 0.1, "lr": 1e-3}  # modes are hundredths wide here: the paper's 10 keeps the critic flat
IN_THE_PLANE = ("8gaussians", "25gaussians", "swissroll", "ring")
RESIDUAL = {"lr": 2e-4, "decay_steps": 100_000}
PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    **{("unrolled", data): RING for data in IN_THE_PLANE},
    **{(algorithm, data): MILD for algorithm in ("r1", "r2") for data in IN_THE_PLANE},
    ("wgan-gp", "cifar10"): RESIDUAL,
    ("ct-gan", "cifar10"): RESIDUAL,
    # 14 steps an epoch, where the paper's 1e-4 would average over 700 epochs; 397 digits are left to measure on.
    ("ssl-ct-gan", "digits"): {"ema": 0.999, "limit": 1400},
}

# Values that some systems have no use for; those that do have them in their defaults or in the data's.
_ADAM = {name for name, system in SYSTEMS.items() if name != "wgan"}
TAKEN_BY: dict[str, set[str]] = {
    "betas": _ADAM,
    "penalty_weight": {"wgan-gp", "ct-gan", "dragan"},
    "one_sided": {"wgan-gp", "ct-gan"},
    "noise": {"gan-noise"},
    "noise_steps": {"gan-noise"},
    **{
        option: {name for name, system in SYSTEMS.items() if option in system.defaults}
        for option in (
            "clip",
            "gamma",
            "lazy",
            "scale",
            "unroll",
            "consistency_weight",
            "consistency_margin",
            "labels_per_class",
        )
    },
}


def network_for(algorithm: str, data: str) -> str:
    """The network of a system on a data set where none is named."""
    residual = data == "cifar10" and algorithm in ("wgan-gp", "ct-gan")
    if algorithm == "ct-gan":
        return "ct-resnet" if residual else "ct"
    if algorithm == "ssl-ct-gan":
        return "semi-supervised"
    if residual:
        return "resnet"
    return "unrolled" if algorithm == "unrolled" and data in IN_THE_PLANE else default_network(data)


def defaults_for(algorithm: str, data: str, network: str | None) -> dict[str, Any]:
    """What a system takes on a data set: the data's values, then the system's, then those of the two together.

    Another network than they would have comes with its own sizes.
    """
    merged = DATA_DEFAULTS[data] | SYSTEMS[algorithm].defaults | PAIRS.get((algorithm, data), {})
    usual = network_for(algorithm, data)
    if network not in (None, usual) or algorithm == "ssl-ct-gan":
        chosen = NETWORKS[network or usual]
        merged |= {"latent": chosen.latent, "width": chosen.width}
    merged["network"] = usual
    return {name: value for name, value in merged.items() if algorithm in TAKEN_BY.get(name, SYSTEMS)}
