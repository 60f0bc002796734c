"""Plot of the approximate R1 penalty's error over sigma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gpkernels.bench.approximate import PRECISIONS, Comparison, Errors, Row

COLOURS = dict(zip(PRECISIONS, ("#2563a8", "#d9622b", "#7b4fa3"), strict=True))
LEAST = 1e-5  # smaller errors, such as the exact penalty's in float32, would compress the others
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e2da",
    "svg.fonttype": "none",
    "svg.hashsalt": "gpkernels",  # makes the file reproducible
}


def plot(path: Path, comparison: Comparison, title: str) -> None:
    """Plot bias and spread of the value and of its weight gradients; the file's suffix selects the format."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("value", "gradients"), strict=True):
            for precision, colour in COLOURS.items():
                _draw(axes, [row for row in comparison.rows if row.precision == precision], kind, colour)
            axes.set(
                xscale="log", yscale="log", xlabel="sigma", title="weight gradients" if kind == "gradients" else kind
            )
        figure.axes[0].set_ylabel("share of the exact one")
        figure.axes[0].set_ylim(bottom=LEAST)
        keys = [Line2D([], [], color=colour, label=precision) for precision, colour in COLOURS.items()]
        keys += [
            Line2D([], [], color="black", marker="o", markersize=4, label="bias; hollow: within two standard errors"),
            Line2D([], [], color="black", linestyle="--", label="spread of one draw"),
            Line2D([], [], color="black", linestyle=":", label="error of the exact penalty"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(title)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: Any, rows: list[Row], kind: str, colour: str) -> None:
    errors: dict[float, Errors] = {row.sigma: getattr(row, kind) for row in rows if row.sigma is not None}
    axes.plot([*errors], [abs(e.bias) for e in errors.values()], color=colour)
    for sigma, error in errors.items():
        filled = "full" if abs(error.bias) > 2 * error.uncertainty else "none"
        axes.plot(sigma, abs(error.bias), color=colour, marker="o", markersize=4, fillstyle=filled)
    axes.plot([*errors], [e.spread for e in errors.values()], color=colour, linestyle="--")
    for row in rows:
        if row.sigma is None:
            axes.axhline(abs(getattr(row, kind).bias), color=colour, linestyle=":")
