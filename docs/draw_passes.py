"""Draw the passes of a gradient penalty, eager PyTorch's and ours, as docs/passes.svg.

python docs/draw_passes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("passes.svg")
UNIT, HEIGHT, GAP, LEFT = 118, 58, 8, 14
FORWARD, BACKWARD, TANGENT, WEIGHTS, ZEROS = "#4c78a8", "#59a14f", "#b07aa1", "#e08a2e", "url(#zeros)"


class Pass(NamedTuple):
    """A pass over all layers: what it computes, and the products it takes in units of a forward pass."""

    text: str
    colour: str
    units: int = 1


START = [Pass("forward\nD(x)", FORWARD), Pass("pull back\ng = ∇D(x)", BACKWARD)]
ROWS = [
    (
        "Eager PyTorch: the double backward goes back through the forward graph once more, on zeros",
        [
            *START,
            Pass("push forward\ntangent of g", TANGENT),
            Pass("weights\nδ ⊗ tangent", WEIGHTS),
            Pass("back through the forward graph\nall cotangents are exactly zero", ZEROS, 2),
        ],
    ),
    (
        "gpkernels: the tangent and one product for each weight; no pass is on zeros",
        [*START, Pass("push forward\ntangent of g", TANGENT), Pass("weights\nδ ⊗ tangent", WEIGHTS)],
    ),
]


def drawn() -> str:
    """Return the drawing."""
    width = LEFT + 6 * (UNIT + GAP) + 60
    row_height = HEIGHT + 58
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {len(ROWS) * row_height + 6}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>Passes of a gradient penalty with its weight gradients: 6 L in eager PyTorch, 4 L here</title>",
        '<defs><pattern id="zeros" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="8" height="8" fill="#8a8a8a"/><rect width="3" height="8" fill="#767676"/></pattern></defs>',
        f'<rect width="{width}" height="{len(ROWS) * row_height + 6}" rx="6" fill="#ffffff"/>',
    ]
    for row, (title, passes) in enumerate(ROWS):
        top = row * row_height + 36
        lines.append(f'<text x="{LEFT}" y="{top - 14}" fill="#222222">{title}</text>')
        x = LEFT
        for one in passes:
            wide = one.units * UNIT + (one.units - 1) * GAP
            lines.append(f'<rect x="{x}" y="{top}" width="{wide}" height="{HEIGHT}" rx="5" fill="{one.colour}"/>')
            for line, text in enumerate(one.text.split("\n")):
                at = f'x="{x + wide / 2:g}" y="{top + 25 + 18 * line}"'
                lines.append(f'<text {at} fill="#ffffff" text-anchor="middle">{text}</text>')
            x += wide + GAP
        total = sum(one.units for one in passes)
        lines.append(
            f'<text x="{x + 4}" y="{top + 36}" fill="#222222" font-size="20" font-weight="bold">{total} L</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(drawn())
