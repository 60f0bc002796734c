"""A ring of 8 Gaussians: a plain GAN's generator rotates through modes, an unrolled one covers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptrainer import plots
from gptrainer.data.points import Mixture, circle
from gptrainer.models import sample
from gptrainer.models.mlp import orthogonal
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import play, system_of

PAPER = "Metz et al. 2017, section 3.1, figure 2 and appendix A"
RING = Mixture(circle(8, 2.0), 0.02)
REACH = 0.2  # ten times a mode's sigma
LATENT, WIDTH, GAIN = 256, 128, 0.8
LOOKS, SHOWN = 40, 8  # evaluations; how many of them are drawn


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Train the same networks at the same rates with 0 and with 5 unrolled steps."""
    runs = {algorithm: _run(algorithm, settings, seed) for algorithm in ("gan", "unrolled")}
    half = len(runs["gan"]["modes"]) // 2
    modes = {algorithm: [len(found) for found in run["modes"]][half:] for algorithm, run in runs.items()}
    return Findings(
        {
            "unrolled_modes": max(modes["unrolled"]),
            "unrolled_mean": sum(modes["unrolled"]) / len(modes["unrolled"]),
            "advantage": (sum(modes["unrolled"]) - sum(modes["gan"])) / len(modes["gan"]),
            "visited": len(set().union(*runs["gan"]["modes"])) - sum(modes["gan"]) / len(modes["gan"]),
        },
        runs,
    )


def _run(algorithm: str, settings: Settings, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = nn.Sequential(*orthogonal([LATENT, WIDTH, WIDTH, 2], nn.ReLU(), GAIN))
    critic = nn.Sequential(Quarter(), *orthogonal([2, WIDTH, 1], nn.ReLU(), GAIN))
    ahead = {"unroll": 5} if algorithm == "unrolled" else {}
    steps = settings["steps"]
    values = {"lr": 1e-4, "generator_lr": 1e-3, "betas": (0.5, 0.999), "latent": LATENT}
    system = system_of(algorithm, "ring", generator, critic, seed, batch_size=settings["batch"], **values, **ahead)
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(1000, LATENT, generator=random)
    curve: dict[str, Any] = {"step": [], "modes": [], "samples": []}

    def look(step: int) -> None:
        points = sample(generator, latent)
        near = torch.cdist(points, RING.centres) < REACH
        curve["step"].append(step)
        curve["modes"].append([mode for mode in range(8) if near[:, mode].double().mean() >= 0.01])
        curve["samples"].append(points[:300].double().tolist())

    play(system, RING.sample, steps, random, steps // LOOKS, look)
    curve["samples"] = curve["samples"][4 :: LOOKS // SHOWN]
    return curve


class Quarter(nn.Module):
    """Scale the ring to the order of 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 4


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    panels: list[pictures.Panel] = []
    real = RING.sample(300, torch.Generator().manual_seed(0))
    for algorithm, title, colour in (
        ("gan", "No look ahead", plots.PURPLE),
        ("unrolled", "Five steps ahead", plots.BLUE),
    ):
        with pictures.panel(panels, title, f"snapshots of training, {title}", width=6.4, height=3.4) as ax:
            for index, points in enumerate(findings[0].series[algorithm]["samples"]):
                shift = torch.tensor([6.0 * (index % 4), -6.0 * (index // 4)])
                ax.plot(*(real + shift).T, ".", color=plots.ORANGE, markersize=3, rasterized=True)
                ax.plot(*(torch.tensor(points) + shift).T, ".", color=colour, markersize=2, alpha=0.5, rasterized=True)
            ax.set(aspect="equal", xlim=(-3.4, 21.4), ylim=(-9.4, 3.4), xticks=[], yticks=[])
            ax.set(xlabel="eight moments of training, in rows", ylabel="$x_2$ by $x_1$")
            ax.grid(False)
    with pictures.panel(panels, "Modes at a time", width=6.4, height=3.4) as ax:
        for algorithm, colour, label in (
            ("gan", plots.PURPLE, "no look ahead"),
            ("unrolled", plots.BLUE, "five steps ahead"),
        ):
            for one in findings:
                ax.plot(
                    one.series[algorithm]["step"],
                    [len(found) for found in one.series[algorithm]["modes"]],
                    color=colour,
                )
            ax.plot([], [], color=colour, label=label)
        pictures.reference(ax, 8, "published for unrolling: all 8", below=True)
        ax.set(xlabel="generator steps", ylabel="modes with 1 % of the samples or more", ylim=(-0.3, 8.6))
        ax.legend(frameon=False, loc="center right")
    return Exhibits({"ring": pictures.Picture("Real points in orange. Each line of the last panel is a run.", panels)})


EXPERIMENT = Experiment(
    name="unrolled",
    title="Unrolled GAN: the ring is covered instead of visited mode by mode",
    source=PAPER,
    about=(
        "A generator of two hidden layers of 128 units and a discriminator of one, ReLU, orthogonal of gain 0.8, the "
        "discriminator's input over 4; latent size 256, batch 512, rates 1e-3 and 1e-4, with and without five unrolled "
        "steps. A mode counts with 1 % of the samples within ten times its σ."
    ),
    settings={"quick": {"steps": 80, "batch": 128}, "full": {"steps": 25_000, "batch": 512}},
    seeds={"quick": 1, "full": 5},
    measure=measure,
    claims=(
        Claim(
            "With five unrolled steps the generator covers the ring",
            PAPER,
            "all 8 modes",
            "unrolled_modes",
            "most modes at a time in the second half",
            Bound(at_least=7),
            "ring",
            only_full="80 steps do not get that far",
        ),
        Claim(
            "With five unrolled steps the ring stays covered",
            PAPER,
            "all 8 modes",
            "unrolled_mean",
            "modes at a time in the second half, mean",
            Bound(at_least=6),
            "ring",
            only_full="80 steps do not get that far",
        ),
        Claim(
            "Without unrolling the generator covers fewer modes",
            PAPER,
            "one or few at a time",
            "advantage",
            "modes at a time, with less without",
            Bound(at_least=2, of="the mean"),
            "ring",
            only_full="80 steps do not get that far",
        ),
        Claim(
            "Without unrolling the generator moves from mode to mode",
            PAPER,
            "rotates through the modes",
            "visited",
            "modes visited in all, less modes at a time",
            Bound(at_least=2, of="the mean"),
            "ring",
            only_full="80 steps do not get that far",
        ),
    ),
    exhibit=exhibit,
    limits=(
        "The public code has another discriminator, two hidden layers of tanh of gain 1.4. With that, in two runs of "
        "25,000 steps each, the generator without unrolling covered all 8 modes, too, from step 12,500 on. "
        "Of five seeds of the full size, 0 to 4, four showed the effect whole: all 8 modes at every evaluation of the "
        "second half with unrolling, .55 at a time without. Of seed 0 neither generator settled (1.1 and 1.25 modes at "
        "a time), so the claims about every seed failed, and the mean advantage, 5.9 modes with a 95 % interval of 1.7 "
        "to 10.2, was undecided beside the bound of 2."
    ),
    version=2,
)
