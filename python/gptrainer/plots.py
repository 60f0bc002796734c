"""The pictures of a run. Figures are built without pyplot, so no state of matplotlib's is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptrainer.files import replacing

Curve = Mapping[str, Sequence[float]]
INK, SOFT, PAPER = "#1f2933", "#8a94a0", "#fcfbf7"
BLUE, ORANGE, GREEN, PURPLE = "#2563a8", "#d9622b", "#2f8f6b", "#7b4fa3"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "grid.color": "#e4e2da",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure in our style, written to ``path`` at the end. Inches, at 160 dots each."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        fig = Figure(figsize=(width, height), dpi=160)
        fig.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        FigureCanvasAgg(fig)
        yield fig
        with replacing(path) as part:
            fig.savefig(part, format="png")


def plot_digits(path: Path, title: str, generated: Tensor, real: Tensor, classes: tuple[Tensor, Tensor]) -> None:
    """Generated images beside real ones, one row a class. Images: (N, 1, 8, 8); classes: (N,) of each."""
    with figure(path, 12, 6.7) as fig:
        fig.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
        for ax, name, images, labels in zip(
            fig.subplots(1, 2),
            ("Generated, each row what the classifier takes for one digit", "Real"),
            (generated, real),
            classes,
            strict=True,
        ):
            ax.imshow(_by_class(images, labels), cmap="bone_r", vmin=0, vmax=1, interpolation="none")
            ax.set_title(name, fontweight="normal")
            ax.set_axis_off()


def _by_class(images: Tensor, labels: Tensor, rows: int = 10, columns: int = 10, scale: int = 8) -> Any:
    """One picture of the first images of each class, enlarged smoothly; a class without enough of them has gaps."""
    images = nn.functional.pad(images, (1, 1, 1, 1))  # a stroke at the edge of an image fades out instead of being cut
    height, width = (scale * n for n in images.shape[2:])
    gap = 0
    canvas = torch.zeros(rows * (height + gap) - gap, columns * (width + gap) - gap)
    large = nn.functional.interpolate(images, scale_factor=scale, mode="bicubic").clamp(0, 1)[:, 0]
    for row in range(rows):
        for column, index in enumerate((labels == row).nonzero().flatten()[:columns]):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = large[index]
    return canvas.numpy()


def plot_ring(path: Path, title: str, generated: Tensor, real: Tensor, critic: nn.Module, device: torch.device) -> None:
    """Generated points on real ones, over the critic's level lines. Points: (N, 2)."""
    axis = torch.linspace(-2.1, 2.1, 160)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)
    with torch.no_grad():
        heights = critic(grid.to(device)).cpu().reshape(len(axis), len(axis))
    heights = heights - heights.mean()
    with figure(path, 8.2, 7.4) as fig:
        ax = fig.subplots()
        filled = ax.contourf(axis, axis, heights, levels=24, cmap="RdBu_r", alpha=0.45)
        ax.contour(axis, axis, heights, levels=24, colors="white", linewidths=0.6)
        ax.scatter(*real.T, s=16, color=ORANGE, alpha=0.5, linewidths=0, label="real")
        ax.scatter(*generated.T, s=7, color=INK, alpha=0.6, linewidths=0, label="generated")
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=(-2.1, 2.1), ylim=(-2.1, 2.1))
        ax.set_title(title, fontsize=14)
        ax.grid(False)
        bar = fig.colorbar(filled, ax=ax, shrink=0.8, pad=0.02)
        bar.set_label("critic's score, less its mean")
        bar.outline.set_visible(False)
        ax.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", facecolor=PAPER)


def plot_curves(
    path: Path, title: str, critic: Curve, quality: Curve, facts: Mapping[str, float], target: bool
) -> None:
    """Three panels over the generator's steps. target: draw the norm that the penalty asks for."""
    with figure(path, 9.5, 9.6) as fig:
        fig.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
        top, middle, bottom = fig.subplots(3, 1, sharex=True)
        _noisy(top, critic["step"], critic["wasserstein_estimate"], BLUE)
        top.set(title="The critic's estimate of the Wasserstein distance", ylabel="E D(real) \N{MINUS SIGN} E D(fake)")
        top.set_ylim(bottom=min(0.0, top.get_ylim()[0]))
        _noisy(middle, critic["step"], critic["gradient_norm"], ORANGE)
        middle.set(title="The critic's slope between real and generated samples", ylabel="mean gradient norm")
        if target:
            _reference(middle, 1.0, "target 1")
        if "frechet_distance" in quality:
            _frechet_panel(bottom, quality, facts)
        else:
            _coverage_panel(bottom, quality)
        bottom.set_xlabel("generator steps")
        fig.align_ylabels()


def _frechet_panel(ax: Any, quality: Curve, facts: Mapping[str, float]) -> None:
    ax.plot(quality["step"], quality["frechet_distance"], color=GREEN, linewidth=2, marker="o", markersize=4)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(title="Sample quality: Fréchet distance to the real digits (lower is better)", ylabel="Fréchet distance")
    _reference(ax, facts["frechet_distance_of_real_halves"], "two halves of the real digits, 900 each")


def _coverage_panel(ax: Any, quality: Curve) -> None:
    share = 100 * np.asarray(quality["share_within_4_sigma"])
    modes = 100 / 8 * np.asarray(quality["modes_covered"])
    ax.plot(quality["step"], modes, color=PURPLE, linewidth=2, drawstyle="steps-post", label="modes covered, of 8")
    ax.plot(
        quality["step"],
        share,
        color=GREEN,
        linewidth=2,
        marker="o",
        markersize=4,
        label="samples within $4\\sigma$ of a mode",
    )
    ax.set(title="Sample quality: how much of the ring is found", ylabel="share (%)", ylim=(-3, 105))
    ax.legend(loc="lower right", frameon=False)


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
