"""Panels in the trainer's style; a picture is a row of panels that wraps on a narrow page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gptrainer.plots import BLUE, GREEN, INK, ORANGE, PURPLE, STYLE

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#b3892b", "#4a5560")
PUBLISHED: Any = {"color": INK, "dashes": (4, 3), "linewidth": 1.2}  # of a curve
PANEL: Any = {"font.size": 10, "axes.titlesize": 10.5, "legend.fontsize": 9, "svg.hashsalt": "gpkernels"}


@dataclass(frozen=True)
class Panel:
    """An SVG image as a data URI, with its alternative text and its size in inches."""

    uri: str
    alt: str
    width: float
    height: float


@dataclass(frozen=True)
class Picture:
    """Panels with a caption."""

    caption: str
    panels: Sequence[Panel] = field(default_factory=list)


@contextmanager
def panel(panels: list[Panel], title: str, alt: str = "", *, width: float = 4.4, height: float = 3.4) -> Iterator[Any]:
    """Yield axes; the panel is then appended to ``panels``. Many points should be drawn ``rasterized``."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({**STYLE, **PANEL}):
        fig = Figure(figsize=(width, height), dpi=160)
        fig.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        FigureCanvasSVG(fig)
        ax = fig.subplots()
        ax.set_title(title)
        yield ax
        drawn = io.BytesIO()
        fig.savefig(drawn, format="svg", metadata={"Date": None})
    uri = "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode("ascii")
    panels.append(Panel(uri, alt or f"{title}: {ax.get_ylabel()} over {ax.get_xlabel()}", width, height))


def reference(ax: Any, height: float, text: str, *, at: float = 0.0, below: bool = False) -> None:
    """Draw a dashed line at a published value, labelled on the left (at 0) or the right (at 1)."""
    ax.axhline(height, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    side = {"ha": "left" if at < 0.5 else "right", "va": "top" if below else "bottom"}
    shift = (4 if at < 0.5 else -4, -3 if below else 3)
    ax.annotate(text, (at, height), shift, ax.get_yaxis_transform(), "offset points", color=INK, fontsize=9, **side)
