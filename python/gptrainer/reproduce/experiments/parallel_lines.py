"""Two parallel lines: the Wasserstein distance depends on their distance, the Jensen-Shannon divergence does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import gpkernels
from gptrainer import plots
from gptrainer.models import build_models
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import fit

POINTS = 64  # of the unit interval, equally likely; both lines have the same, so the distance is exact
CERTAIN = 60.0  # the logit of a discriminator that is sure to within rounding

EXACT = "Arjovsky et al. 2017, Example 1"


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Compute exact values over a range of theta, and the estimates of trained critics for some of them."""
    thetas = [round(-1 + 0.05 * step, 2) for step in range(41)]
    exact = [exact_wasserstein(theta) for theta in thetas]
    divergence = [exact_jensen_shannon(theta) for theta in thetas]
    tried = list(settings["trained_at"])
    critics = [trained(theta, "wgan", settings) for theta in tried]
    discriminators = [trained(theta, "gan", settings) for theta in tried]
    apart = [at for at, theta in enumerate(thetas) if theta != 0]
    measures = {
        "wasserstein_error": max(abs(exact[at][0] - abs(theta)) for at, theta in enumerate(thetas)),
        "gradient_error": max(abs(exact[at][1] - math.copysign(1, thetas[at])) for at in apart),
        "divergence_error": max(abs(divergence[at] - (math.log(2) if thetas[at] else 0)) for at in range(len(thetas))),
        "critic_gradient_error": max(abs(g - math.copysign(1, t)) for t, (_, g) in zip(tried, critics, strict=True)),
        "discriminator_error": max(abs(value - math.log(2)) / math.log(2) for value, _ in discriminators),
        "discriminator_gradient": max(abs(gradient) for _, gradient in discriminators),
    }
    return Findings(
        measures,
        {
            "theta": thetas,
            "exact": [value for value, _ in exact],
            "divergence": divergence,
            "tried": tried,
            "critics": critics,
            "discriminators": discriminators,
        },
    )


def line(theta: Tensor, z: Tensor) -> Tensor:
    """Generate the example's samples (theta, z), (N, 2)."""
    return torch.stack([theta.expand(len(z)), z], dim=1)


def exact_wasserstein(theta: float) -> tuple[float, float]:
    """Compute W1 between the lines at 0 and theta and its derivative, by the optimal plan, locally constant."""
    import ot  # the experiment is listed without it

    z = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    cost = torch.linalg.vector_norm(line(torch.zeros_like(at), z)[:, None] - line(at, z), dim=2)
    weights = torch.full((POINTS,), 1 / POINTS, dtype=torch.float64).numpy()
    plan = torch.from_numpy(ot.emd(weights, weights, cost.detach().numpy()))
    total = (plan * cost).sum()
    (gradient,) = torch.autograd.grad(total, at)
    return total.item(), gradient.item()


def exact_jensen_shannon(theta: float) -> float:
    """Compute log 2 - L/2 for the best discriminator, which is certain where the lines differ."""
    sure = torch.full((POINTS,), CERTAIN if theta else 0.0, dtype=torch.float64)
    return math.log(2) - gpkernels.gan_discriminator_loss(sure, -sure).item() / 2


def trained(theta: float, kind: str, settings: Settings) -> tuple[float, float]:
    """Train a critic or discriminator; return its estimate of the distance and the derivative in theta."""
    critic: nn.Module = build_models("lines", 2, settings["width"], network="mlp")[1]
    at, origin, batch = torch.tensor(theta, requires_grad=True), torch.tensor(0.0), settings["batch"]
    penalty = "wgan-gp" if kind == "wgan" else "none"
    loss = gpkernels.CriticLoss(critic, objective=kind, penalty=penalty, penalty_weight=10.0)
    optimiser = torch.optim.Adam(critic.parameters(), lr=settings["lr"], betas=(0.5, 0.9))
    fit(
        lambda: loss(line(origin, torch.rand(batch)), line(at, torch.rand(batch)).detach()).loss,
        optimiser,
        settings["steps"],
    )
    z = (torch.arange(1024) + 0.5) / 1024
    fake = critic(line(at, z))
    if kind == "wgan":
        estimate = -gpkernels.wgan_critic_loss(critic(line(origin, z)), fake)
    else:
        estimate = math.log(2) - gpkernels.gan_discriminator_loss(critic(line(origin, z)), fake) / 2
    (gradient,) = torch.autograd.grad(estimate, at)
    return estimate.item(), gradient.item()


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    shown = findings[0].series
    theta, tried = shown["theta"], shown["tried"]
    panels: list[pictures.Panel] = []
    with pictures.panel(panels, "Wasserstein-1 distance") as ax:
        ax.plot(
            theta,
            [abs(t) for t in theta],
            **pictures.PUBLISHED,
            label=r"published, $|\theta|$",
        )
        ax.plot(theta, shown["exact"], color=plots.BLUE, linewidth=4, alpha=0.35, label="exact transport")
        ax.plot(tried, [value for value, _ in shown["critics"]], "o", color=plots.ORANGE, label="WGAN-GP critic")
        ax.set(xlabel=r"$\theta$, distance of the lines", ylabel=r"$W_1$", ylim=(0, 1.15))
        ax.legend(frameon=False, loc="upper center")
    with pictures.panel(panels, "Jensen–Shannon divergence") as ax:
        left, right = (
            [(t, v) for t, v in zip(theta, shown["divergence"], strict=True) if t < 0],
            [(t, v) for t, v in zip(theta, shown["divergence"], strict=True) if t > 0],
        )
        for side in (left, right):
            ax.plot(*zip(*side, strict=True), color=plots.BLUE, linewidth=4, alpha=0.35)
        ax.plot([0], [0], "o", color=plots.BLUE, alpha=0.6, label="best discriminator, exact")
        ax.plot(
            tried,
            [value for value, _ in shown["discriminators"]],
            "o",
            color=plots.ORANGE,
            label="trained discriminator",
        )
        pictures.reference(ax, math.log(2), "published, log 2", at=0.0)
        ax.set(xlabel=r"$\theta$, distance of the lines", ylabel="JS (nats)", ylim=(-0.03, 0.82))
        ax.legend(frameon=False, loc="lower left")
    with pictures.panel(panels, "Gradient of the generator") as ax:
        ax.plot(
            [-1.05, 0, 0, 1.05],
            [-1, -1, 1, 1],
            **pictures.PUBLISHED,
            label=r"published, $\mathrm{sign}\,\theta$",
        )
        ax.plot(tried, [g for _, g in shown["critics"]], "o", color=plots.ORANGE, label="through the WGAN-GP critic")
        ax.plot(
            tried,
            [g for _, g in shown["discriminators"]],
            "s",
            color=plots.PURPLE,
            label="through the discriminator",
        )
        ax.set(
            xlabel=r"$\theta$, distance of the lines",
            ylabel=r"derivative of the estimate by $\theta$",
            ylim=(-1.3, 1.75),
        )
        ax.legend(frameon=False, loc="upper left")
    caption = (
        "The distance falls towards 0 and its slope points there; the divergence is flat wherever the lines differ."
    )
    return Exhibits({"distances": pictures.Picture(caption, panels)})


EXPERIMENT = Experiment(
    name="parallel-lines",
    title="Parallel lines: a distance with a slope, and a divergence without one",
    source=EXACT,
    about=(
        "The data lie on a segment, the generator's on a parallel one at distance θ. Both distances are computed "
        "exactly, by optimal transport and by the best discriminator, and again with trained networks."
    ),
    settings={
        "quick": {"trained_at": [-1.0, -0.5, 0.5, 1.0], "steps": 400, "width": 64, "batch": 64, "lr": 2e-3},
        "full": {
            "trained_at": [-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0],
            "steps": 2000,
            "width": 128,
            "batch": 128,
            "lr": 1e-3,
        },
    },
    seeds={"quick": 1, "full": 3},
    measure=measure,
    claims=(
        Claim(
            "The Wasserstein distance of the lines is |θ|",
            EXACT,
            "W = |θ|",
            "wasserstein_error",
            "largest |W − |θ|| over 41 values of θ",
            Bound(at_most=1e-9),
            "distances",
        ),
        Claim(
            "The Wasserstein distance has a usable gradient everywhere but at 0",
            EXACT,
            "dW/dθ = sign θ",
            "gradient_error",
            "largest |dW/dθ − sign θ|",
            Bound(at_most=1e-9),
            "distances",
        ),
        Claim(
            "The Jensen–Shannon divergence is log 2 unless the lines coincide",
            EXACT,
            "JS = log 2 for θ ≠ 0, 0 at 0",
            "divergence_error",
            "largest error against log 2 (0 at θ = 0), in nats",
            Bound(at_most=1e-9),
            "distances",
        ),
        Claim(
            "A trained Wasserstein critic passes this gradient to the generator",
            EXACT,
            "dW/dθ = sign θ; with penalty weight 10 the best slope is 1.05",
            "critic_gradient_error",
            "largest error of the derivative through the critic",
            Bound(at_most=0.15),
            "distances",
        ),
        Claim(
            "A trained discriminator reports log 2 at every distance",
            EXACT,
            "JS = log 2",
            "discriminator_error",
            "largest relative error of its estimate",
            Bound(at_most=0.05),
            "distances",
        ),
        Claim(
            "A trained discriminator passes almost no gradient to the generator",
            EXACT,
            "dJS/dθ = 0",
            "discriminator_gradient",
            "largest derivative through the discriminator",
            Bound(at_most=0.05),
            "distances",
        ),
    ),
    exhibit=exhibit,
)
