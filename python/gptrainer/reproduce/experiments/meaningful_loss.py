"""Correlation of the critic's loss with sample quality."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from gptrainer import plots
from gptrainer.loop import Trainer
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import start, train

PAPER = "Arjovsky et al. 2017"
OURS = ("steps", "evaluations", "optima", "further")  # settings that are not the trainer's
NAMES = {"8gaussians": "8 Gaussians", "digits": "digits", "fashion-mnist": "Fashion-MNIST"}


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Record the critic's estimate and sample quality, of WGAN-GP on points and images and of a plain GAN."""
    images = _run("wgan-gp", settings["images"], "frechet_distance", settings["wgan"], seed, context)  # may be absent
    game = _run("nsgan", settings["images"], "frechet_distance", settings["gan"], seed, context)
    points = _run("wgan-gp", "8gaussians", "wasserstein_1", settings["points"], seed, context)
    third = max(1, len(game["optimal"]) // 3)
    early, late = (sum(part) / third for part in (game["optimal"][:third], game["optimal"][-third:]))
    return Findings(
        {
            "points_rank": _rank(points),
            "images_rank": _rank(images),
            "game_rank": _rank(game),
            "game_rise": late / early,
            "game_optimal": game["optimal"][-1] / math.log(2),
            "game_quality": game["quality"][-1] / game["quality"][0],
        },
        {"points": points, "images": images, "game": game, "data": settings["images"]},
    )


def _rank(curve: dict[str, Any]) -> float:
    from scipy.stats import spearmanr  # the experiment is listed without it

    return float(spearmanr(curve["estimate"], curve["quality"][1:]).statistic)


def _run(algorithm: str, data: str, quality: str, settings: Settings, seed: int, context: Context) -> dict[str, Any]:
    values = {name: value for name, value in settings.items() if name not in OURS}
    trainer = start(algorithm, data, settings["steps"], seed, context, **values)
    estimate = trainer.system.estimate.name
    every = settings["steps"] // settings["evaluations"]
    optima = settings.get("optima", 0)
    curve: dict[str, Any] = {"step": [], "estimate": [], "quality": [trainer.quality_curve[quality][0]]}
    curve |= {"optimal_step": [], "optimal": []}

    def look(run: Trainer, losses: dict[str, float]) -> None:
        curve["step"].append(run.step)
        curve["estimate"].append(losses[estimate])
        curve["quality"].append(run.quality.measure(run.evaluated("generator"))[quality])

        if optima and run.step % (settings["steps"] // optima // every * every) == 0:
            curve["optimal_step"].append(run.step)
            curve["optimal"].append(estimate_at_optimum(run, settings["further"]))

    train(trainer, every, look)
    return curve


def estimate_at_optimum(trainer: Trainer, steps: int) -> float:
    """Train the critic alone for further steps; return its mean estimate in the last 20, and put it back."""
    system = trainer.system
    before = copy.deepcopy((system.critic.state_dict(), system.critic_optimiser.state_dict()))
    values = [
        system.metrics(system.critic_step(*batch))[system.estimate.name].item() for batch in trainer.next_batches(steps)
    ]
    system.critic.load_state_dict(before[0])
    system.critic_optimiser.load_state_dict(before[1])
    return sum(values[-20:]) / 20


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    panels: list[pictures.Panel] = []
    data = NAMES[findings[0].series["data"]]
    for key, title, label, quality in (
        ("points", "WGAN-GP on 8 Gaussians", "critic's estimate", "exact $W_1$"),
        ("images", f"WGAN-GP on {data}", "critic's estimate", "Fréchet distance"),
        ("game", f"Plain GAN on {data}", "JS estimate (nats)", "Fréchet distance"),
    ):
        with pictures.panel(panels, title) as ax:
            other = ax.twinx()
            for one in findings:
                curve = one.series[key]
                ax.plot(curve["step"], curve["estimate"], color=plots.BLUE)
                other.semilogy(curve["step"], curve["quality"][1:], color=plots.ORANGE, dashes=(3, 2))
            if key == "game":
                for one in findings:
                    ax.plot(one.series[key]["optimal_step"], one.series[key]["optimal"], "o", color=plots.BLUE)
                ax.plot([], [], "o", color=plots.BLUE, label="discriminator at its optimum")
                ax.legend(frameon=False, loc="lower right")
                pictures.reference(ax, math.log(2), "log 2", below=True)
                ax.set_ylim(0, 0.75)
            else:
                ax.set_ylim(0, None)
            other.grid(False)
            other.spines["right"].set_visible(True)
            ax.set_xlabel("generator steps")
            ax.set_ylabel(label, color=plots.BLUE)
            other.set_ylabel(f"{quality} (dashed)", color=plots.ORANGE)
    caption = (
        "Published: the Wasserstein estimate falls with the quality of samples, the Jensen–Shannon estimate "
        "stays or rises while they improve."
    )
    return Exhibits({"losses": pictures.Picture(caption, panels)})


EXPERIMENT = Experiment(
    name="meaningful-loss",
    title="A loss that means something",
    source=f"{PAPER}, figures 3 and 4",
    about=(
        "Along training, the critic's estimate (its mean between evaluations) beside a distance that it is not "
        "trained on: exact optimal transport on points, the Fréchet distance in a classifier's features on images. "
        "Lower is better for both. The plain GAN's discriminator lags behind its optimum, so copies of it are trained "
        "alone along the run."
    ),
    settings={
        "quick": {
            "images": "digits",
            "points": {"steps": 400, "evaluations": 16, "width": 64, "lr": 1e-3, "critic_boost": True},
            "wgan": {"steps": 400, "evaluations": 16, "width": 64, "lr": 1e-3, "critic_boost": True},
            "gan": {"steps": 1200, "evaluations": 15, "width": 64, "lr": 1e-3, "optima": 1, "further": 800},
        },
        "full": {
            "images": "fashion-mnist",
            "points": {"steps": 2000, "evaluations": 25, "width": 128, "critic_boost": True},
            "wgan": {"steps": 600, "evaluations": 25, "width": 16, "batch_size": 32, "critic_boost": True},
            "gan": {"steps": 2000, "evaluations": 25, "width": 16, "batch_size": 32, "optima": 12, "further": 400},
        },
    },
    seeds={"quick": 1, "full": 5},
    measure=measure,
    claims=(
        Claim(
            "The Wasserstein estimate falls with the exact distance",
            f"{PAPER}, figure 3",
            "correlates with quality",
            "points_rank",
            "rank correlation with exact W₁ along training, 8 Gaussians",
            Bound(at_least=0.6),
            "losses",
        ),
        Claim(
            "The Wasserstein estimate falls with the distance of images",
            f"{PAPER}, figure 3",
            "correlates with quality",
            "images_rank",
            "rank correlation with the Fréchet distance along training",
            Bound(at_least=0.6),
            "losses",
        ),
        Claim(
            "A plain GAN's samples improve",
            f"{PAPER}, figure 4",
            "they do",
            "game_quality",
            "Fréchet distance at the end over that at the start",
            Bound(at_most=0.5),
            "losses",
        ),
        Claim(
            "A plain GAN's Jensen–Shannon estimate does not fall while its samples improve",
            f"{PAPER}, figure 4",
            "stays or rises",
            "game_rise",
            "estimate of a discriminator at its optimum, mean of the last third of a run over the first",
            Bound(at_least=0.9, of="the mean"),
            "losses",
            only_full="the discriminator is brought to its optimum once, at the end",
        ),
        Claim(
            "The estimate of an optimal discriminator is log 2 however good the samples are",
            f"{PAPER}, figure 4",
            "log 2 = 0.69 nats",
            "game_optimal",
            "estimate over log 2, after further training of the discriminator alone",
            Bound(at_least=0.9),
            "losses",
        ),
    ),
    exhibit=exhibit,
    needs="Fashion-MNIST for the full set",
    limits=(
        "Published curves are of weight clipping on LSUN; these are of the gradient penalty, which converges "
        "within the budget."
    ),
    version=2,
)
