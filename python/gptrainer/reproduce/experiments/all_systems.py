"""All systems on one data set with one budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from gptrainer import plots
from gptrainer.models import sample
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings, Table
from gptrainer.reproduce.training import start, train
from gptrainer.systems import configure

SYSTEMS = (
    "gan", "nsgan", "gan-noise", "hinge", "lsgan", "wgan", "wgan-gp", "ct-gan", "r1", "r2", "r3gan", "dragan",
    "unrolled",
)  # fmt: skip
HIGHEST_RATE = 1e-3
PENALISED = ("wgan-gp", "ct-gan", "r1", "r2", "r3gan", "dragan")


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Train every system with the same number of critic steps; record quality and training time."""
    rows = {name: _run(name, settings, seed, context) for name in SYSTEMS}
    early, last = ({name: row["frechet"][at] for name, row in rows.items()} for at in (1, -1))
    return Findings(
        {
            "worst_improvement": min(rows[name]["frechet"][0] / last[name] for name in PENALISED),
            "gp_over_clipping": last["wgan-gp"] / last["wgan"],
            "ns_over_saturating": early["nsgan"] / early["gan"],
        },
        {"rows": rows, "data": settings["data"], "critic_steps": settings["critic_steps"]},
    )


def _run(name: str, settings: Settings, seed: int, context: Context) -> dict[str, Any]:
    n_critic = 5 if name in ("wgan", "wgan-gp", "ct-gan") else 1
    steps = settings["critic_steps"] // n_critic
    values = {"width": settings["width"], "batch_size": settings["batch"], "n_critic": n_critic}
    begun = time.thread_time()
    trainer = start(name, settings["data"], steps, seed, context, **values, **_hastened(name, settings))
    started = time.thread_time() - begun
    curve: dict[str, Any] = {"frechet": [trainer.quality_curve["frechet_distance"][0]], "seconds": -started}

    def look(run: object, losses: dict[str, float]) -> None:
        paused = time.thread_time()
        measured = trainer.quality.measure(trainer.evaluated("generator"))
        curve["frechet"].append(measured["frechet_distance"])
        curve["score"] = measured["inception_score"]
        curve["seconds"] -= time.thread_time() - paused

    train(trainer, steps // 5, look)
    curve["seconds"] += time.thread_time() - begun
    latent = torch.randn(8, trainer.config.latent, generator=torch.Generator().manual_seed(seed))
    curve["samples"] = sample(trainer.evaluated("generator"), latent)[:, 0].mul(255).round().int().tolist()
    return curve


def _hastened(name: str, settings: Settings) -> dict[str, float]:
    """Raise the system's learning rates for a short run, and shorten its moving average accordingly."""
    own = configure(name, settings["data"])
    rates = {
        option: min(settings["rates"] * rate, HIGHEST_RATE)
        for option, rate in (("lr", own.lr), ("generator_lr", own.resolved("generator_lr")))
    }
    return rates | ({"ema": settings["ema"]} if own.ema else {})


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    runs = {name: [one.series["rows"][name] for one in findings] for name in SYSTEMS}
    order = sorted(SYSTEMS, key=lambda name: fmean(run["frechet"][-1] for run in runs[name]))
    panels: list[pictures.Panel] = []
    with pictures.panel(panels, "Fréchet distance, same number of critic steps", width=5.6, height=4.2) as ax:
        for place, name in enumerate(order):
            values = [run["frechet"][-1] for run in runs[name]]
            ax.barh(place, fmean(values), 0.6, color=plots.BLUE, alpha=0.35)
            ax.plot(values, [place] * len(values), "o", color=plots.BLUE, markersize=4)
        ax.set_yticks(range(len(order)), order)
        ax.invert_yaxis()
        ax.set(xlabel="Fréchet distance in the classifier's features (lower is better)", xscale="log")
    with pictures.panel(
        panels, "Samples, as they come", "generated images, a row each system", width=5.6, height=4.2
    ) as ax:
        rows = [torch.cat([torch.tensor(image) for image in runs[name][0]["samples"]], dim=1) for name in order]
        picture = torch.cat(rows)
        side = len(rows[0])
        ax.imshow(picture, cmap="bone_r", interpolation="nearest", vmin=0, vmax=255)
        ax.set_yticks([side * (at + 0.5) for at in range(len(order))], order)
        ax.set_xticks([])
        ax.grid(False)
    return Exhibits(
        {
            "order": pictures.Picture(
                "Best first. Dots are seeds; samples are the first eight of the first seed.", panels
            )
        },
        (_table(runs, order, findings),),
    )


def _table(runs: dict[str, list[dict[str, Any]]], order: Sequence[str], findings: Sequence[Findings]) -> Table:
    def cell(values: Sequence[float]) -> str:
        return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")

    shows = findings[0].series
    columns: tuple[Callable[[dict[str, Any]], float], ...] = (
        lambda run: run["frechet"][-1],
        lambda run: run["frechet"][0],
        lambda run: run["score"],
        lambda run: run["seconds"],
    )
    return Table(
        f"{shows['data']}, {shows['critic_steps']:,} critic steps each, {len(findings)} seeds; seconds of one "
        f"core, training alone.",
        ("system", "Fréchet distance", "at the start", "score", "seconds"),
        [(name, *(cell([value(run) for run in runs[name]]) for value in columns)) for name in order],
    )


EXPERIMENT = Experiment(
    name="all-systems",
    title="All systems on one data set",
    source=(
        "this trainer; Gulrajani et al. 2017, figure 3, and Goodfellow et al. 2014, section 3, for the order "
        "of two pairs"
    ),
    about=(
        "The same networks, batch and number of critic steps for every system, each with its paper's optimiser; its "
        f"rates are five times the paper's, at most {HIGHEST_RATE:g}, as papers train hundreds of times longer. No "
        "claim is made about the whole order."
    ),
    settings={
        "quick": {"data": "digits", "critic_steps": 300, "width": 64, "batch": 48, "rates": 5.0, "ema": 0.98},
        "full": {"data": "fashion-mnist", "critic_steps": 1000, "width": 16, "batch": 32, "rates": 5.0, "ema": 0.99},
    },
    seeds={"quick": 1, "full": 3},
    measure=measure,
    claims=(
        Claim(
            "Every system with a gradient penalty learns",
            "each system's paper",
            "they do",
            "worst_improvement",
            "Fréchet distance at the start over that at the end, least of six systems",
            Bound(at_least=2),
            "order",
            only_full="300 critic steps are too few",
        ),
        Claim(
            "WGAN-GP is ahead of clipping in as many steps",
            "Gulrajani et al. 2017, figure 3",
            "faster and better",
            "gp_over_clipping",
            "Fréchet distance, WGAN-GP over WGAN",
            Bound(at_most=1.0, of="the mean"),
            "order",
        ),
        Claim(
            "Early on the non-saturating loss is ahead of the saturating one",
            "Goodfellow et al. 2014, section 3",
            "the same fixed point, but stronger gradients early in learning",
            "ns_over_saturating",
            "Fréchet distance after a fifth of the steps, nsgan over gan",
            Bound(at_most=1.0, of="the mean"),
            "order",
        ),
    ),
    exhibit=exhibit,
    needs="Fashion-MNIST for the full set",
    limits=(
        "R1, R2 and R3GAN are measured by a moving average of the generator, as published, with a memory of 100 steps "
        "where R1's paper has 1000."
    ),
    version=4,
)
