"""Logs of a run: curves in a CSV file, scalars and images for TensorBoard."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpkernels.arguments import replacing

Curve = Mapping[str, Sequence[float]]
CSV_NAME = "curves.csv"
TENSORBOARD_NAME = "tensorboard"


def write_csv(path: Path, *curves: Curve) -> None:
    """Write one row for each step and one column for each curve; missing points are empty cells."""
    rows: defaultdict[float, dict[str, float]] = defaultdict(dict)
    for curve in curves:
        for values in zip(*curve.values(), strict=True):
            point = dict(zip(curve, values, strict=True))
            rows[point["step"]] |= point
    columns = dict.fromkeys(name for curve in curves for name in curve)
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))


class EventLog:
    """Scalars and images for TensorBoard, if enabled and installed; otherwise every method does nothing."""

    def __init__(self, folder: Path, first: int, enabled: bool) -> None:
        """first: the first step; events that an earlier process wrote from there on are hidden."""
        self.writer: Any = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=first)
            except ImportError:
                print("no TensorBoard log: install it with pip install 'gpkernels[tensorboard]'", file=sys.stderr)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Log one point of a curve for each name."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def samples(self, samples: Tensor, step: int) -> None:
        """Log images (N, C, H, W) in [0, 1] or [-1, 1] as a grid, points (N, 2) as a picture of their density."""
        if self.writer is None:
            return
        if samples.dim() == 4:
            images = (samples[:64] + 1) / 2 if (samples < 0).any() else samples[:64]
            self.writer.add_images("samples", images.clamp(0, 1), step)
        elif samples.shape[1:] == (2,):
            self.writer.add_image("samples", density(samples), step)
        else:
            self.writer.add_histogram("samples", samples, step)

    def close(self) -> None:
        """Flush and close."""
        if self.writer is not None:
            self.writer.close()


def density(points: Tensor, reach: float = 2.1, cells: int = 128) -> Tensor:
    """Grey picture (1, cells, cells) of the density of points in the square [-reach, reach]^2, y upwards."""
    counts = torch.histogramdd(points.cpu().float(), cells, range=[-reach, reach] * 2).hist
    shades = counts.sqrt() / counts.max().clamp(min=1).sqrt()
    return 1 - shades.T.flip(0).unsqueeze(0)
