"""The picture of a run's curves: what the critic says, how steep it is, and how good the samples are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptrainer.logs import Curve
from gptrainer.plots import BLUE, GREEN, INK, ORANGE, figure

ESTIMATES = {
    "wasserstein_estimate": (
        "The critic's estimate of the Wasserstein distance",
        "E D(real) \N{MINUS SIGN} E D(fake)",
    ),
    "js_estimate": ("The critic's estimate of the Jensen-Shannon divergence", "nats"),
}
LOGARITHMIC = ("frechet_distance",)
REFERENCES = {"frechet_distance": ("frechet_distance_of_real_halves", "two halves of the real data")}


def plot_curves(
    path: Path,
    title: str,
    estimate: str,
    critic: Curve,
    quality: Curve,
    facts: Mapping[str, float],
    target: float | None,
) -> None:
    """A panel for the critic's estimate, one for its slope and one for each measure, over the generator's steps.

    estimate: the name of its curve. target: the gradient norm that the penalty asks for.
    """
    measures = [name for name in quality if name != "step"]
    rows = 2 + len(measures)
    with figure(path, 9.5, 0.6 + 3 * rows) as fig:
        fig.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
        top, slope, *others = fig.subplots(rows, 1, sharex=True)
        _noisy(top, critic["step"], critic.get(estimate, ()), BLUE)
        top.set(title=ESTIMATES[estimate][0], ylabel=ESTIMATES[estimate][1])
        if estimate == "js_estimate":
            _reference(top, math.log(2), "log 2: no overlap")
        _noisy(slope, critic["step"], critic.get("gradient_norm", ()), ORANGE)
        slope.set(title="The critic's slope between real and generated samples", ylabel="mean gradient norm")
        if target is not None:
            _reference(slope, target, f"target {target:g}")
        for ax, name in zip(others, measures, strict=True):
            _measure(ax, name, quality, facts)
        (others or [slope])[-1].set_xlabel("generator steps")
        fig.align_ylabels()


def _measure(ax: Any, name: str, quality: Curve, facts: Mapping[str, float]) -> None:
    words = name.replace("_", " ").replace("frechet", "Fréchet")
    ax.plot(quality["step"], quality[name], color=GREEN, linewidth=2, marker="o", markersize=4)
    ax.set(title=f"Sample quality: {words}", ylabel=words)
    if name in LOGARITHMIC:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    if name in REFERENCES and REFERENCES[name][0] in facts:
        _reference(ax, facts[REFERENCES[name][0]], REFERENCES[name][1])


def _noisy(ax: Any, steps: Sequence[float], values: Sequence[float], color: str) -> None:
    """Every measured value, and a running median over a twentieth of them."""
    ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    if len(values) < 3:
        return
    reach = max(1, len(values) // 40)
    median = [np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    ax.plot(steps, median, color=color, linewidth=2.2)


def _reference(ax: Any, height: float, text: str) -> None:
    ax.axhline(height, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    # At the left, where curves are still far from where they are going.
    ax.annotate(text, (0, height), (6, 4), ax.get_yaxis_transform(), "offset points", color=INK, fontsize=10)
