"""The pictures of a run. Figures are built without pyplot, so no state of matplotlib's is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpkernels.arguments import replacing
from gptrainer.algorithms.system import Estimate
from gptrainer.logs import Curve

Facts = Mapping[str, float]
Score = Callable[[Tensor], Tensor]
INK, SOFT, PAPER = "#1f2933", "#8a94a0", "#fcfbf7"
BLUE, ORANGE, GREEN, PURPLE = "#2563a8", "#d9622b", "#2f8f6b", "#7b4fa3"
DPI = 160
SMALLEST = 64  # pixels that an image is at least enlarged towards
STYLE: Any = {
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), PAPER),
    "grid.color": "#e4e2da",
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure in our style, written to ``path`` at the end. Inches, at DPI dots each."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        fig = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield fig
        with replacing(path) as part:
            fig.savefig(part, format="png")


def plot_images(
    path: Path, title: str, generated: Tensor, real: Tensor, classes: tuple[Tensor, Tensor] | None = None
) -> None:
    """Generated images beside real ones. Images: (N, C, H, W) in [0, 1], C 1 or 3.

    classes: (N,) of each, which make one row a class.
    """
    rows = "Generated" if classes is None else "Generated, each row what the classifier takes for one class"
    with figure(path, 12, 6.7) as fig:
        fig.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
        for i, (ax, name, images) in enumerate(zip(fig.subplots(1, 2), (rows, "Real"), (generated, real), strict=True)):
            in_order = torch.where(torch.arange(100) < len(images), torch.arange(100), -1).view(10, 10)
            chosen = in_order if classes is None else _by_class(classes[i], int(torch.cat(classes).max()))
            ax.imshow(image_grid(images, chosen), cmap="bone_r", vmin=0, vmax=1, interpolation="none")
            ax.set_title(name, fontweight="normal")
            ax.set_axis_off()


def image_grid(images: Tensor, chosen: Tensor) -> Any:
    """One picture, (H, W) or (H, W, 3) in [0, 1]. chosen: (rows, columns) indices of images, -1 for a gap."""
    if images.shape[1] == 1:
        images = F.pad(images, (1, 1, 1, 1))  # a stroke at the edge of an image fades out instead of being cut
    scale = max(1, SMALLEST // images.shape[2])  # small images are enlarged smoothly
    large = F.interpolate(images, scale_factor=scale, mode="bicubic").clamp(0, 1)
    blank = torch.full_like(large[:1], float(large.shape[1] > 1))  # the paper's colour, at index -1
    tiles = torch.cat([large, blank])[chosen].permute(0, 3, 1, 4, 2)  # row, height, column, width, channel
    return tiles.flatten(2, 3).flatten(0, 1).squeeze(-1).numpy()


def _by_class(labels: Tensor, last: int) -> Tensor:
    """(classes, 10) indices of the first images of each of the first ten classes, -1 where a class has too few."""
    chosen = torch.full((min(10, last + 1), 10), -1)
    for row, of_class in enumerate(chosen):
        indices = (labels == row).nonzero().flatten()[:10]
        of_class[: len(indices)] = indices
    return chosen


def plot_points(path: Path, title: str, generated: Tensor, real: Tensor, score: Score) -> None:
    """Generated points on real ones, over the critic's level lines. Points: (N, 2)."""
    across, up = _window(real)
    x, y = torch.linspace(*across, 160), torch.linspace(*up, 160)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    heights = score(grid).reshape(len(y), len(x))
    heights = heights - heights.mean()
    with figure(path, 8.2, 7.4) as fig:
        ax = fig.subplots()
        levels = ax.contourf(x, y, heights, levels=24, cmap="RdBu_r", alpha=0.45)
        ax.contour(x, y, heights, levels=24, colors="white", linewidths=0.6)
        ax.scatter(*real.T, s=16, color=ORANGE, alpha=0.5, linewidths=0, label="real")
        ax.scatter(*generated.T, s=7, color=INK, alpha=0.6, linewidths=0, label="generated")
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=across, ylim=up)
        ax.set_title(title, fontsize=14)
        ax.grid(False)
        bar = fig.colorbar(levels, ax=ax, shrink=0.8, pad=0.02)
        bar.set_label("critic's score, less its mean")
        bar.outline.set_visible(False)
        ax.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", facecolor=PAPER)


def _window(real: Tensor) -> list[tuple[float, float]]:
    """The ends of two axes of one length, with half as much again about the real points."""
    low, high = real.amin(dim=0), real.amax(dim=0)
    middle, reach = (low + high) / 2, 0.75 * (high - low).max().item()
    return [(m - reach, m + reach) for m in middle.tolist()]


def plot_line(path: Path, title: str, generated: Tensor, real: Tensor, score: Score) -> None:
    """The critic's score along the line, with the positions of real and generated points. Points: (N, 1)."""
    reach = 1.2 * max(1.0, real.abs().max().item(), generated.abs().max().item())
    x = torch.linspace(-reach, reach, 400)
    with figure(path, 8.2, 5) as fig:
        ax = fig.subplots()
        ax.plot(x, score(x[:, None]).flatten(), color=BLUE, linewidth=2, label="critic's score")
        for points, color, name in ((real, ORANGE, "real"), (generated, INK, "generated")):
            positions = points.flatten().unique()
            ax.vlines(positions, 0, 0.12, transform=ax.get_xaxis_transform(), color=color, linewidth=3, label=name)
        ax.set(xlabel="$x$", ylabel="D(x)")
        ax.set_title(title, fontsize=14)
        ax.legend(loc="upper left", frameon=False)


def plot_curves(
    path: Path, title: str, estimate: Estimate, critic: Curve, quality: Curve, facts: Facts, target: float | None
) -> None:
    """Three panels over the generator's steps, and a fourth where the critic is itself a classifier.

    estimate: the critic's, among its curves. target: the gradient norm that the penalty asks for.
    """
    rows = 4 if "held_out_error" in quality else 3
    with figure(path, 9.5, 3.2 * rows) as fig:
        fig.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
        top, middle, bottom, *more = fig.subplots(rows, 1, sharex=True)
        _noisy(top, critic, estimate.name, BLUE)
        top.set(title=f"The critic's estimate of the {estimate.divergence}", ylabel=estimate.formula)
        if estimate.most:
            _reference(top, estimate.most, "disjoint distributions")
        else:
            top.set_ylim(bottom=min(0.0, top.get_ylim()[0]))
        _noisy(middle, critic, "gradient_norm", ORANGE)
        middle.set(title="The critic's slope between real and generated samples", ylabel="mean gradient norm")
        if target is not None:
            _reference(middle, target, f"target {target:g}")
        _quality_panel(bottom, quality, facts)
        for ax in more:
            ax.plot(quality["step"], 100 * np.asarray(quality["held_out_error"]), color=PURPLE, linewidth=2)
            ax.set(title="The classifier's error on held-out images (lower is better)", ylabel="error (%)")
        (more or [bottom])[-1].set_xlabel("generator steps")
        fig.align_ylabels()


def _quality_panel(ax: Any, quality: Curve, facts: Facts) -> None:
    line: Any = {"linewidth": 2, "marker": "o", "markersize": 4, "color": GREEN}
    if "modes_covered" in quality:
        share = 100 * np.asarray(quality["share_within_4_sigma"])
        modes = 100 / facts["modes"] * np.asarray(quality["modes_covered"])
        label = f"modes covered, of {facts['modes']:.0f}"
        ax.plot(quality["step"], modes, color=PURPLE, linewidth=2, drawstyle="steps-post", label=label)
        ax.plot(quality["step"], share, label="samples within $4\\sigma$ of a mode", **line)
        ax.set(title="Sample quality: how many modes are found", ylabel="share (%)", ylim=(-3, 105))
        ax.legend(loc="lower right", frameon=False)
        return
    name, what, same = "wasserstein_1", "exact Wasserstein distance to the data", "two samples of the data"
    if "frechet_distance" in quality:
        name, what = "frechet_distance", "Fréchet distance to real images"
        same = f"two halves of the real images, {facts['images_in_a_real_half']:,.0f} each"
    ax.plot(quality["step"], quality[name], **line)
    if min(quality[name]) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set(title=f"Sample quality: {what} (lower is better)", ylabel=what.partition(" to ")[0])
    if facts[f"{name}_of_real_halves"] > 0:
        _reference(ax, facts[f"{name}_of_real_halves"], same)


def _noisy(ax: Any, curve: Curve, name: str, color: str) -> None:
    """Every measured value, and a running median over a twentieth of them."""
    steps, values = curve.get("step", ()), curve.get(name, ())
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
