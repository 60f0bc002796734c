"""Results as plots and as one self-contained HTML page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpkernels.bench.results import Row, duration
from gpkernels.bench.trial import AS_PROGRAM, BY_INDUCTOR, EAGER, JVP_FLASH, LIMIT, OURS

COLOURS = {
    OURS: "#2563a8", BY_INDUCTOR: "#5b9bd5", AS_PROGRAM: "#2a9d8f",
    EAGER: "#8a94a0", "compile": "#d9622b", "jax": "#7b4fa3", JVP_FLASH: "#b0307a", LIMIT: "#1f2933",
}  # fmt: skip
NAMES = {
    BY_INDUCTOR: "gpkernels, compiled", AS_PROGRAM: 'gpkernels, backend="gpkernels"',
    EAGER: "eager PyTorch", "compile": "torch.compile", "jax": "JAX, jitted", LIMIT: "least the machine needs",
}  # fmt: skip
TITLES = {
    "ops": "Ops",
    "attention": "Attention",
    "gradients": "Input gradients",
    "steps": "Penalties and critic steps",
    "train": "Training iterations",
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e2da",
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "gpkernels",  # reproducible output
}


@dataclass(frozen=True)
class Picture:
    """name: of its file. title: above the plot. svg: the plot."""

    name: str
    title: str
    svg: str


def write(path: Path, about: dict[str, Any], rows: Sequence[Row], doubts: Sequence[str]) -> None:
    """Write the page."""
    environment = Environment(loader=PackageLoader("gpkernels.bench", "."), autoescape=True)
    environment.filters["duration"] = duration
    shown = [(picture.title, Markup(_inline(picture))) for picture in pictures(rows)]
    page = environment.get_template("page.html.j2").render(
        about=about, rows=rows, doubts=doubts, pictures=shown, names=NAMES, missing=lambda x: x is None or x != x
    )
    path.write_text(page + "\n", encoding="utf-8")


def pictures(rows: Sequence[Row]) -> list[Picture]:
    """Plot bars for the cases of a suite and lines for its curves."""
    drawn = []
    for suite in dict.fromkeys(row.suite for row in rows):
        here = [row for row in rows if row.suite == suite]
        flat = [row for row in here if not row.axis]
        if flat:
            drawn.append(_picture(suite, f"{TITLES[suite]}: how many fit into one of eager PyTorch", flat, _bars))
        for axis in dict.fromkeys(row.axis for row in here if row.axis):
            curve = [row for row in here if row.axis == axis]
            name = re.sub(r"[^a-z0-9]+", "-", f"{suite}-{axis}".lower()).strip("-")
            drawn.append(_picture(name, axis, curve, _lines))
    return drawn


def _picture(name: str, title: str, rows: Sequence[Row], draw: Callable[[Any, Sequence[Row]], None]) -> Picture:
    with rc_context(STYLE):
        cases = len(dict.fromkeys(row.case for row in rows))
        figure = Figure(figsize=(8, 1.2 + 0.42 * cases) if draw is _bars else (6, 3.6), layout="constrained")
        draw(figure, rows)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": title})
    return Picture(name, title, file.getvalue())


def _bars(figure: Figure, rows: Sequence[Row]) -> None:
    axes: Axes = figure.subplots()
    cases = list(dict.fromkeys(row.case for row in rows))
    peers = [peer for peer in COLOURS if peer not in (EAGER, LIMIT) and any(row.peer == peer for row in rows)]
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        found = {row.case: row.speedup for row in rows if row.peer == peer}
        places = [at + (i - (len(peers) - 1) / 2) * height for at in range(len(cases))]
        values = [found.get(case, math.nan) for case in cases]
        bars = axes.barh(places, values, height * 0.92, color=COLOURS[peer], label=NAMES.get(peer, peer))
        labels = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        axes.bar_label(bars, labels, padding=3, fontsize=7)
    least = {row.case: row.speedup for row in rows if row.peer == LIMIT}
    most = max((row.speedup for row in rows if row.peer in peers and math.isfinite(row.speedup)), default=1.0) * 1.15
    near = [(at, least[case]) for at, case in enumerate(cases) if least.get(case, math.inf) <= most]
    axes.scatter(
        [x for _, x in near], [y for y, _ in near], marker="|", s=120, color=COLOURS[LIMIT], label=NAMES[LIMIT]
    )
    axes.axvline(1, color=COLOURS[EAGER], linewidth=1.2)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, most)
    axes.set_xlabel("eager PyTorch's time over this one's")
    figure.legend(loc="outside upper left", ncols=4, frameon=False)


def _lines(figure: Figure, rows: Sequence[Row]) -> None:
    axes: Axes = figure.subplots()
    for peer, colour in COLOURS.items():
        points = sorted((row.size, row.cpu_us / 1e3) for row in rows if row.peer == peer)
        if points:
            style: dict[str, Any] = (
                {"linestyle": "--", "linewidth": 1.0} if peer == LIMIT else {"marker": "o", "markersize": 3.5}
            )
            axes.plot(*zip(*points, strict=True), color=colour, label=NAMES.get(peer, peer), **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(rows[0].axis.rpartition(": ")[2])
    axes.set_ylabel("milliseconds")
    axes.legend(frameon=False)


def _inline(picture: Picture) -> str:
    """Prepare an SVG for embedding, with an accessible name."""
    svg = picture.svg[picture.svg.index("<svg") :]
    return svg.replace("<svg", f'<svg role="img" aria-label="{picture.title}"', 1)
