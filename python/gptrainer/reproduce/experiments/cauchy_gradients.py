"""A discriminator that is optimal up to white noise gives the -log D generator gradients with infinite variance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gpkernels
from gptrainer import plots
from gptrainer.models import build_models
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings

SOURCE = "Arjovsky & Bottou 2017, theorem 2.6"
Array = NDArray[np.float64]
LEVEL = 0.01
NOISE = 1e-3  # standard deviation of the discriminator's error: D = 0 on generated samples, plus this
SLOPE = 1.0  # of its gradient's error


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Draw many independent errors of the discriminator; compute the generator's gradient for each."""
    from scipy import stats  # the experiment is listed without it

    generator = build_models("lines", 2, settings["width"], network="mlp")[0]
    weights = list(generator.parameters())
    latent = torch.randn(settings["batch"], 2)
    samples = torch.stack([_gradient(generator, weights, latent) for _ in range(settings["draws"])]).double().numpy()
    scales = _predicted_scales(generator, weights, latent)
    alive = np.flatnonzero(scales > 1e-6)  # a weight behind a dead unit has no gradient at all
    chosen = np.random.default_rng(seed).choice(alive, settings["coordinates"], replace=False)
    cauchy = _p_values(_distances(samples[:, chosen]), settings["draws"], settings["resamples"], seed)
    normal = [
        stats.kstest(samples[:, at], "norm", (samples[:, at].mean(), samples[:, at].std())).pvalue for at in chosen
    ]
    fitted = np.median(np.abs(samples[:, chosen]), axis=0)
    error = np.abs(fitted / scales[chosen] - 1)
    shown = samples[:, chosen[0]] / fitted[0]
    running = np.abs(np.cumsum(shown)) / np.arange(1, len(shown) + 1)
    return Findings(
        {
            "cauchy_accepted": float(np.mean(cauchy >= LEVEL)),
            "normal_rejected": float(np.mean(np.asarray(normal) < 1e-6)),
            "centre": float(np.max(np.abs(np.median(samples[:, chosen], axis=0)) / fitted)),
            "scale_error": float(np.median(error)),
        },
        {
            "gradient": np.sort(shown).tolist(),
            "spread": float(shown.std()),
            "running": running[:: max(1, len(running) // 200)].tolist(),
            "cauchy_p": cauchy.tolist(),
        },
    )


def _gradient(generator: torch.nn.Module, weights: Sequence[Tensor], latent: Tensor) -> Tensor:
    """Compute the gradient of E -log D(G(z)) for one draw of the discriminator's error.

    D(x) near a sample is e + r.(x - x0), with independent normal e and r; the loss takes its logit. The sign of e
    cannot matter, r being symmetric, so that |e| stands for it and D is a probability.
    """
    fake = generator(latent)
    value = (NOISE * torch.randn(len(fake), 1)).abs().clamp(1e-9, 0.5)
    slope = SLOPE * torch.randn_like(fake) / (value * (1 - value))  # of the logit
    logits = torch.logit(value) + (slope * (fake - fake.detach())).sum(dim=1, keepdim=True)
    loss = gpkernels.nonsaturating_generator_loss(logits)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])


def _predicted_scales(generator: torch.nn.Module, weights: Sequence[Tensor], latent: Tensor) -> Array:
    """Scales of the Cauchy distributions: r.J / e has |J| sd(r) / sd(e); scales of independent terms add."""
    total = torch.zeros(sum(weight.numel() for weight in weights))
    for z in latent:
        x = generator(z[None])[0]
        rows = [torch.autograd.grad(coordinate, weights, retain_graph=True) for coordinate in x]
        jacobian = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
        total += jacobian.norm(dim=0)
    return (total / len(latent) * SLOPE / NOISE).double().numpy()


def _distances(samples: Array) -> Array:
    """Kolmogorov-Smirnov distance of each column to the centred Cauchy distribution, its scale fitted: (columns,).

    The scale is the median of the sizes, which for this distribution it is.
    """
    from scipy import stats

    ordered = np.sort(samples / np.median(np.abs(samples), axis=0), axis=0)
    expected, steps = stats.cauchy.cdf(ordered), np.arange(len(ordered) + 1)[:, None] / len(ordered)
    return np.maximum(expected - steps[:-1], steps[1:] - expected).max(axis=0)


def _p_values(distances: Array, draws: int, resamples: int, seed: int) -> Array:
    """Compute p-values from simulated Cauchy samples, whose scale is fitted too and cancels."""
    random = np.random.default_rng(seed)
    null = np.concatenate([_distances(random.standard_cauchy((draws, 50))) for _ in range(resamples // 50)])
    return (1 + (null[:, None] >= distances).sum(axis=0)) / (1 + len(null))


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    from scipy import stats

    shown = findings[0].series
    gradient = np.asarray(shown["gradient"])
    panels: list[pictures.Panel] = []
    axis = np.linspace(-12, 12, 400)
    with pictures.panel(panels, "One coordinate of the gradient") as ax:
        inside = gradient[np.abs(gradient) < 12]
        ax.hist(
            inside,
            bins=80,
            weights=np.full(len(inside), 80 / 24 / len(gradient)),
            color=plots.BLUE,
            alpha=0.35,
            label=f"{len(gradient):,} draws",
        )
        ax.plot(axis, stats.cauchy.pdf(axis), **pictures.PUBLISHED, label="published: Cauchy")
        ax.plot(
            axis,
            stats.norm.pdf(axis, scale=shown["spread"]),
            color=plots.ORANGE,
            label=f"normal, sd {shown['spread']:.0f}",
        )
        ax.set(xlabel="gradient over its fitted Cauchy scale", ylabel="density")
        ax.legend(frameon=False)
    with pictures.panel(panels, "Its tail") as ax:
        size = np.sort(np.abs(gradient))[::-1]
        share = np.arange(1, len(size) + 1) / len(size)
        ax.loglog(size, share, color=plots.BLUE, linewidth=4, alpha=0.35, label="measured")
        x = np.logspace(-1, np.log10(size[0]), 100)
        ax.loglog(x, 2 * stats.cauchy.sf(x), **pictures.PUBLISHED, label="published: Cauchy")
        ax.loglog(x, 2 * stats.norm.sf(x, scale=shown["spread"]), color=plots.ORANGE, label="normal of the same sd")
        ax.set(xlabel="|gradient| over its scale", ylabel="share of draws beyond", ylim=(0.5 / len(size), 1.5))
        ax.legend(frameon=False)
    with pictures.panel(panels, "Goodness of fit, coordinate by coordinate") as ax:
        values = sorted(value for one in findings for value in one.series["cauchy_p"])
        ax.plot(np.linspace(0, 1, len(values)), values, "o", color=plots.BLUE, markersize=4, label="Cauchy")
        ax.plot([0, 1], [0, 1], **pictures.PUBLISHED, label="if the theorem is true")
        pictures.reference(ax, LEVEL, "rejected below", at=1.0)
        ax.set(xlabel="share of coordinates", ylabel="p-value")
        ax.legend(frameon=False)
    caption = "Gradients a thousand times their typical size are no accident: the average of draws never settles."
    return Exhibits({"cauchy": pictures.Picture(caption, panels)})


EXPERIMENT = Experiment(
    name="cauchy-gradients",
    title="Cauchy gradients: −log D under a noisy discriminator",
    source=SOURCE,
    about=(
        "Where real and generated samples lie on disjoint manifolds, the best discriminator and its gradient "
        "are 0 on the "
        "generated ones. With independent normal errors on both, the gradient of the −log D loss with respect to a "
        "weight of an MLP generator is sampled many times, through the loss that training uses."
    ),
    settings={
        "quick": {"draws": 2000, "batch": 16, "width": 16, "coordinates": 12, "resamples": 1000},
        "full": {"draws": 10000, "batch": 16, "width": 64, "coordinates": 30, "resamples": 2000},
    },
    seeds={"quick": 1, "full": 3},
    measure=measure,
    claims=(
        Claim(
            "Each coordinate of the generator's gradient follows a Cauchy distribution",
            SOURCE,
            "centred Cauchy",
            "cauchy_accepted",
            "share of coordinates that a Kolmogorov–Smirnov test at 1 % does not reject, scale fitted",
            Bound(at_least=0.9),
            "cauchy",
        ),
        Claim(
            "The gradient is not normally distributed",
            SOURCE,
            "infinite expectation and variance",
            "normal_rejected",
            "share of coordinates for which the test rejects the normal at 10⁻⁶",
            Bound(at_least=1.0),
            "cauchy",
        ),
        Claim(
            "The distribution is centred",
            SOURCE,
            "median 0",
            "centre",
            "largest |median| of a coordinate, in its scale",
            Bound(at_most=0.15),
            "cauchy",
        ),
        Claim(
            "Its scale is the sum over samples of the generator's Jacobian norm, times the ratio of the errors",
            f"{SOURCE}, from its proof",
            "‖J‖ sd(∇D) / sd(D), averaged over the batch",
            "scale_error",
            "median relative error of the fitted scale",
            Bound(at_most=0.1),
            "cauchy",
        ),
    ),
    exhibit=exhibit,
    limits="The errors are white noise, as the theorem assumes; those of a trained discriminator need not be.",
)
