"""The systems and data sets by name, and the values that the papers and their public code use."""

from __future__ import annotations

from typing import Any, NamedTuple


class Named(NamedTuple):
    """A line for the list of what there is, and the values that come with it."""

    summary: str
    defaults: dict[str, Any]


# Radford et al. 2016: what the image networks of the first years were trained with.
DCGAN_ADAM = {"lr": 2e-4, "betas": (0.5, 0.999), "n_critic": 1}
# Mescheder et al. 2018 use RMSprop with alpha .99: Adam with these betas, but for its bias correction.
R1_ADAM = {"lr": 1e-4, "betas": (0.0, 0.99), "n_critic": 1}
CONSISTENCY = {"consistency_weight": 2.0, "consistency_margin": 0.0, "dropout": 0.5}

SYSTEMS = {
    "gan": Named("the minimax game, whose generator gradient vanishes (Goodfellow et al. 2014)", DCGAN_ADAM),
    "nsgan": Named("the generator minimises -log D instead (Goodfellow et al. 2014)", DCGAN_ADAM),
    "gan-noise": Named(
        "minimax, with noise on real and fake that falls to 0 (Arjovsky and Bottou 2017, Sønderby et al. 2017)",
        DCGAN_ADAM,
    ),
    "wgan": Named(
        "RMSprop, weights clipped after each step (Arjovsky et al. 2017)",
        {"lr": 5e-5, "batch_size": 64, "clip": 0.01, "n_critic": 5},
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
DATA_SETS = {
    "digits": "1,797 handwritten digits of 8x8 pixels, from scikit-learn",
    "8gaussians": "a ring of eight Gaussians in the plane",
}

# Where a paper has a value of its own for a system on a data set, or the size of a data set asks for one.
PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("wgan-gp", "cifar10"): {"lr": 2e-4, "decay_steps": 100_000},
    ("ct-gan", "cifar10"): {"lr": 2e-4, "decay_steps": 100_000},
    ("unrolled", "8gaussians"): {"batch_size": 512, "latent": 256},
    ("unrolled", "ring"): {"batch_size": 512, "latent": 256},
    ("ssl-ct-gan", "digits"): {"width": 250, "ema": 0.999},  # 18 steps an epoch: 1e-4 would average over 550 epochs
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
            "dropout",
            "labels_per_class",
        )
    },
}


def defaults_for(algorithm: str, data: str) -> dict[str, Any]:
    """What a system takes on a data set: the data's values, then the system's, then those of the two together."""
    merged = DATA_DEFAULTS[data] | SYSTEMS[algorithm].defaults | PAIRS.get((algorithm, data), {})
    return {name: value for name, value in merged.items() if algorithm in TAKEN_BY.get(name, SYSTEMS)}
