"""Phase plots and eigenvalues of the Dirac-GAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptrainer.plots import BLUE, GREEN, INK, ORANGE, SOFT
from gptrainer.reproduce.pictures import COLOURS, Panel, Picture, panel

REACH = 2.4


def phase_picture(rows: Sequence[dict[str, Any]]) -> Picture:
    """Draw the field and both trajectories of every system."""
    panels: list[Panel] = []
    for row in rows:
        sim, alt = row["simultaneous"], row["alternating"]
        with panel(panels, row["name"], f"phase plot of {row['name']}", width=3.5, height=3.7) as ax:
            axis = np.linspace(-REACH, REACH, len(row["field"]))
            arrows = np.asarray(row["field"])
            ax.streamplot(
                axis, axis, arrows[..., 0], arrows[..., 1], color="#cfd3d6", linewidth=0.7, arrowsize=0.7, density=0.8
            )
            for order, colour, name in ((sim, ORANGE, "simultaneous"), (alt, BLUE, "alternating")):
                path = np.asarray(order["path"])
                ax.plot(
                    *path.T,
                    color=colour,
                    linewidth=0.9,
                    alpha=0.8,
                    label=f"{name}: {order['behaviour']}",
                    rasterized=True,
                )
                ax.plot(*path[-1], "o", color=colour, markersize=4)
            ax.plot(0, 0, "+", color=INK, markersize=9)
            ax.plot(1, 1, "o", color=INK, markersize=3)
            ax.set(
                xlabel=r"$\theta$, the generator",
                ylabel=r"$\psi$, the critic",
                xlim=(-REACH, REACH),
                ylim=(-REACH, REACH + 0.9),
            )
            ax.set_aspect("equal")
            ax.grid(False)
            ax.legend(frameon=True, framealpha=0.85, edgecolor="none", loc="upper left", fontsize=8)
    caption = (
        "500 steps from (1, 1) over the gradient field; the cross is the equilibrium, the large dots are "
        "where the steps end. "
        "Published: the first four never come to rest, the last four do."
    )
    return Picture(caption, panels)


def eigenvalue_picture(rows: Sequence[dict[str, Any]]) -> Picture:
    """Draw eigenvalues in the complex plane, formulas as rings and measured ones as dots."""
    panels: list[Panel] = []
    with panel(panels, "Eigenvalues of the field", width=5.0, height=3.8) as ax:
        for index, row in enumerate(rows):
            colour = COLOURS[index % len(COLOURS)]
            published, found = np.asarray(row["published"]), np.asarray(row["found"])
            ax.plot(*published.T, "o", mfc="none", mec=colour, markersize=11 if index % 2 else 14, mew=1.6)
            ax.plot(*found.T, ".", color=colour, markersize=6, label=row["name"])
        ax.axvline(0, color=SOFT, linewidth=1)
        ax.annotate("at rest", (-0.06, -1.25), ha="right", color=GREEN, fontsize=9)
        ax.annotate("away", (0.06, -1.25), color=ORANGE, fontsize=9)
        ax.set(xlabel="real part", ylabel="imaginary part", xlim=(-1.1, 1.15), ylim=(-1.4, 1.4))
        ax.legend(frameon=False, loc="center right", fontsize=7.5)
    with panel(panels, "Modulus of a step's eigenvalues", width=5.0, height=3.8) as ax:
        positions = np.arange(len(rows))
        for order, colour, shift in (("simultaneous", ORANGE, -0.17), ("alternating", BLUE, 0.17)):
            ax.barh(
                positions + shift, [row[order]["radius"] - 1 for row in rows], 0.3, left=1, color=colour, label=order
            )
        ax.axvline(1, color=INK, linewidth=1)
        ax.set_yticks(positions, [row["name"] for row in rows])
        ax.invert_yaxis()
        ax.set(xlabel="largest modulus, step 0.2")
        ax.legend(frameon=False, loc="lower left")
    return Picture("Rings are the published formulas, dots our Jacobians by autograd.", panels)
