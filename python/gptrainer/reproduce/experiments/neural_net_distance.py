"""Distributions that a critic of bounded capacity distinguishes, and the number of samples that any test needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import gpkernels
from gptrainer import plots
from gptrainer.models import build_models
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import fit

PAPER = "Arora et al. 2017"
DIMENSION = 16
Draw = Callable[[int], Tensor]
LARGEST = 2048


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Measure collisions on a finite set, estimates of two families of critics, and the effect of support size."""
    random = np.random.default_rng(seed)
    needed = [samples_needed(n, settings["trials"], random) for n in settings["sizes"]]
    slope = np.polyfit(np.log(settings["sizes"]), np.log(needed), 1)[0]
    few = [power(n, int(0.25 * n**0.5), settings["trials"] * 4, random) for n in settings["sizes"]]
    linear, network = (family_distance(family, settings) for family in ("linear", "network"))
    seen, moved = zip(*(finite_support(m, settings) for m in settings["supports"]), strict=True)
    return Findings(
        {
            "slope": float(slope),
            "power_of_few": float(np.mean(few)),
            "blindness": abs(linear) / network,
            "seen_at_most": seen[-1] / seen[0],
            "transport_left": moved[-1] / moved[0],
        },
        {
            "sizes": settings["sizes"],
            "needed": needed,
            "families": [linear, network],
            "supports": settings["supports"],
            "seen": seen,
            "moved": moved,
        },
    )


def power(n: int, m: int, trials: int, random: np.random.Generator) -> float:
    """Power of a collision test of m samples, uniform on n points or on an unknown half of them; ½ is a guess.

    Only coincidences carry information here, the half being unknown: the test calls "half" where there are more of
    them than midway between both expectations, and guesses at a tie.
    """
    middle = (_coincidences(n, m) + _coincidences(n // 2, m)) / 2
    right = 0.0
    for points, is_half in ((n, False), (n // 2, True)):
        drawn = np.sort(random.integers(points, size=(trials, m)), axis=1)
        found = (drawn[:, 1:] == drawn[:, :-1]).sum(axis=1)
        says_half = np.where(found == middle, 0.5, found > middle)
        right += float(says_half.mean() if is_half else 1 - says_half.mean()) / 2
    return right


def _coincidences(points: int, m: int) -> float:
    """Expected number of m samples that fall on a point already drawn."""
    return float(m - points * (1 - (1 - 1 / points) ** m))


def samples_needed(n: int, trials: int, random: np.random.Generator) -> int:
    """Find the least m, to within 3 %, at which the test is right two times in three."""
    m = 2
    while power(n, m, trials, random) < 2 / 3:
        m = max(m + 1, int(m * 1.03))
    return m


def family_distance(family: str, settings: Settings) -> float:
    """Largest mean difference found between a normal distribution and a ring with the same mean and covariance."""
    critic: nn.Module = nn.Linear(2, 1) if family == "linear" else build_models("swissroll", 2, 64)[1]
    return _estimate(critic, lambda n: torch.randn(n, 2), _ring, settings)


def _ring(n: int) -> Tensor:
    """Draw from a circle of radius sqrt(2), of mean 0 and covariance 1."""
    angle = 2 * torch.pi * torch.rand(n)
    return 2**0.5 * torch.stack([angle.cos(), angle.sin()], dim=1)


def finite_support(m: int, settings: Settings) -> tuple[float, float]:
    """Compare a normal distribution with m of its points by a small network and by exact transport."""
    import ot  # the experiment is listed without it

    scale = DIMENSION**-0.5
    points = scale * torch.randn(m, DIMENSION)
    critic = nn.Sequential(nn.Linear(DIMENSION, 8), nn.ReLU(), nn.Linear(8, 1))
    seen = _estimate(
        critic, lambda n: scale * torch.randn(n, DIMENSION), lambda n: points[torch.randint(m, (n,))], settings
    )
    others = (scale * torch.randn(LARGEST, DIMENSION)).double().numpy()
    cost = ot.dist(points.double().numpy(), others, metric="euclidean")
    return seen, float(ot.emd2(np.full(m, 1 / m), np.full(LARGEST, 1 / LARGEST), cost, numItermax=1_000_000))


def _estimate(critic: nn.Module, real: Draw, fake: Draw, settings: Settings) -> float:
    """Estimate E f(real) - E f(fake) for the best f of slope about 1 in a family, on fresh samples."""
    batch = settings["batch"]
    loss = gpkernels.CriticLoss(critic, penalty="wgan-gp", penalty_weight=10.0, one_sided=True)
    optimiser = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    fit(lambda: loss(real(batch), fake(batch)).loss, optimiser, settings["steps"])
    with torch.no_grad():
        return -gpkernels.wgan_critic_loss(critic(real(50_000)), critic(fake(50_000))).item()


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    shown = findings[0].series
    panels: list[pictures.Panel] = []
    with pictures.panel(panels, "Samples a test needs") as ax:
        sizes = np.asarray(shown["sizes"], float)
        needed = np.asarray([one.series["needed"] for one in findings], float)
        ax.loglog(
            sizes,
            needed.mean(axis=0)[0] * (sizes / sizes[0]) ** 0.5,
            **pictures.PUBLISHED,
            label=r"published: $\sqrt{N}$",
        )
        ax.loglog(sizes, needed.T, "o", color=plots.BLUE, markersize=5)
        ax.plot([], [], "o", color=plots.BLUE, label="measured, each seed")
        ax.set(xlabel="N, size of the set", ylabel="samples for 2 right answers in 3")
        ax.legend(frameon=False)
    with pictures.panel(panels, "A ring against a normal distribution") as ax:
        values = np.asarray([one.series["families"] for one in findings])
        ax.bar(
            ["linear critics", "networks"],
            values.mean(axis=0),
            yerr=values.std(axis=0),
            color=[plots.PURPLE, plots.ORANGE],
            width=0.5,
        )
        ax.axhline(0, color=plots.INK, linewidth=1)
        ax.annotate("published: 0, the means agree", (0, 0.02), ha="center", fontsize=9)
        ax.set(ylabel="largest E f(real) − E f(fake)", xlabel="family of critics")
    with pictures.panel(panels, "A normal distribution against m of its points") as ax:
        for name, colour, label in (
            ("moved", plots.BLUE, "exact transport distance"),
            ("seen", plots.ORANGE, "seen by 8 hidden units"),
        ):
            values = np.asarray([one.series[name] for one in findings])
            ax.loglog(shown["supports"], values.T, "o-", color=colour, linewidth=1.5, markersize=4)
            ax.plot([], [], "o-", color=colour, label=label)
        ax.set(xlabel=f"m, points in {DIMENSION} dimensions", ylabel="distance")
        ax.legend(frameon=False, loc="lower left")
    caption = (
        "Left: coincidences are all there is to see. Middle: a family that knows only means sees none "
        "between distributions "
        "that share theirs. Right: a small network is satisfied with few points, the transport distance is not."
    )
    return Exhibits({"capacity": pictures.Picture(caption, panels)})


EXPERIMENT = Experiment(
    name="neural-net-distance",
    title="Neural-net distance: distributions that a bounded critic does not distinguish",
    source=PAPER,
    about=(
        "Three small problems: distinguishing a finite set from half of it by samples alone; a ring and a normal "
        "distribution with "
        "the same mean, seen by linear critics and by networks; and a distribution against a few of its own points."
    ),
    settings={
        "quick": {
            "sizes": [256, 1024, 4096, 16384],
            "trials": 400,
            "steps": 500,
            "batch": 128,
            "supports": [8, 64, 512],
        },
        "full": {
            "sizes": [256, 1024, 4096, 16384, 65536, 262144],
            "trials": 2000,
            "steps": 3000,
            "batch": 256,
            "supports": [8, 32, 128, 512, 2048],
        },
    },
    seeds={"quick": 1, "full": 2},
    measure=measure,
    claims=(
        Claim(
            "Distinguishing N points from an unknown half of them takes of the order of √N samples",
            "two-sample toy problem after Arora et al. 2017, the birthday bound",
            "Ω(√N): slope ½ in logarithms",
            "slope",
            "slope of log samples over log N",
            Bound(0.44, 0.56),
            "capacity",
        ),
        Claim(
            "With a quarter of √N samples no test does much better than a guess",
            "two-sample toy problem after Arora et al. 2017, the birthday bound",
            "no test below Ω(√N)",
            "power_of_few",
            "share of right answers (½ is a guess)",
            Bound(at_most=0.55),
            "capacity",
        ),
        Claim(
            "An integral probability metric over a family is blind to what the family cannot represent",
            f"{PAPER}, section 2",
            "0 for linear critics where the means agree",
            "blindness",
            "estimate of linear critics over that of networks",
            Bound(at_most=0.1),
            "capacity",
        ),
        Claim(
            "A small network is satisfied with a distribution on few points",
            f"{PAPER}, theorem 3.1 and corollary 3.2",
            "the distance to m points shrinks like √(p log m / m)",
            "seen_at_most",
            "estimate at the largest m over that at the smallest",
            Bound(at_most=0.4),
            "capacity",
        ),
        Claim(
            "The transport distance to few points hardly falls",
            f"{PAPER}, lemma 1",
            "W₁ stays of order 1 unless m is exponential in the dimension",
            "transport_left",
            "exact distance at the largest m over that at the smallest",
            Bound(at_least=0.6),
            "capacity",
        ),
    ),
    exhibit=exhibit,
    limits=(
        "The bound on samples is a lower bound for every test; what is measured is the best known one, by collisions. "
        f"The exact distance is to {LARGEST:,} fresh points, which stand for the distribution."
    ),
)
