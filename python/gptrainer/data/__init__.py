"""Data sets and endless seeded batches of them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from gpkernels.arguments import UserError
from gptrainer.data.batches import Batches, Prefetched, SampledBatches, ShuffledBatches
from gptrainer.data.images import ImageSet, Read, Scaling
from gptrainer.data.points import MIXTURES, POINTS, Mixture
from gptrainer.data.readers import cifar10, digits, fashion_mnist, images
from gptrainer.processes import ALONE, Processes

__all__ = [
    "DATASETS", "MIXTURES", "POINTS", "Batches", "DataSet", "ImageSet", "Mixture", "SampledBatches",
    "ShuffledBatches", "Split", "load_batches", "load_images",
]  # fmt: skip

Split = Literal["train", "held-out"]
UNIT, SIGNED = Scaling(), Scaling(low=-1.0)
DEQUANTISED = Scaling(levels=256, low=-1.0, noise=1 / 128)  # WGAN-GP's code: 2 (x / 256 - .5) + U[0, 1/128)


@dataclass(frozen=True)
class DataSet:
    """shape: of one sample. Of images: read: the function that reads their bytes and labels, scaling: to the values
    of a pixel, classes: number of classes, 0 if the files decide, tested: whether there are test images.
    """

    description: str
    shape: tuple[int, ...]
    read: Callable[[Path | None, Split], Read] | None = None
    scaling: Scaling = UNIT
    classes: int = 0
    tested: bool = False

    @property
    def kind(self) -> Literal["points", "images"]:
        return "points" if self.read is None else "images"


DATASETS = {
    "8gaussians": DataSet("a ring of eight Gaussians, sigma .014", (2,)),
    "25gaussians": DataSet("a grid of 25 Gaussians, sigma .018", (2,)),
    "swissroll": DataSet("a spiral with noise", (2,)),
    "ring": DataSet("eight narrow Gaussians, sigma .01, on the unit circle", (2,)),
    "lines": DataSet("the segment (0, u), u uniform in [0, 1]", (2,)),
    "dirac": DataSet("all mass at 0", (1,)),
    "digits": DataSet("1,797 handwritten digits, with scikit-learn", (1, 8, 8), digits, Scaling(levels=16), 10),
    "fashion-mnist": DataSet("70,000 pictures of clothes, from IDX files", (1, 28, 28), fashion_mnist, UNIT, 10, True),
    "cifar10": DataSet(
        "60,000 photographs in ten classes, from local files", (3, 32, 32), cifar10, DEQUANTISED, 10, tested=True
    ),
    **{
        name: DataSet(
            f"any folder of images, cropped to squares of {side} pixels", (3, side, side), partial(images, side), SIGNED
        )
        for name, side in (("folder", 64), ("folder32", 32))
    },
}


def load_images(
    data: str, *, data_dir: Path | None = None, split: Split = "train", limit: int | None = None
) -> ImageSet:
    """Load the images of a data set. UserError names the option that is wrong.

    limit: number of training images. Held out are the test images or, where there are none, those beyond the limit.
    """
    known = DATASETS[data]
    assert known.read is not None, data
    pixels, labels = known.read(data_dir, split)
    classes = 0 if labels is None else known.classes or int(labels.max()) + 1
    found = ImageSet(pixels, labels, classes, known.scaling)
    if split == "held-out" and known.tested:
        return found
    if limit is not None and not 0 < limit <= len(found):
        raise UserError(f"--limit: expected a number from 1 to the {len(found)} images of {data}, got {limit}")
    if split == "train":
        return found if limit is None else found.subset(torch.arange(limit))
    if limit is None or limit == len(found):
        raise UserError(f"--limit: expected fewer than all images, since {data} has no test images to hold out")
    return found.subset(torch.arange(limit, len(found)))


def load_batches(
    data: str,
    batch_size: int,
    seed: int,
    device: torch.device,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    processes: Processes = ALONE,
) -> Batches:
    """Make endless batches of a data set. Images are shuffled in each epoch and prepared in advance by a thread.

    batch_size: over all processes, a multiple of their number; together they get the batches of one process.
    """
    if DATASETS[data].kind == "points":
        if limit is not None:
            raise UserError(f"--limit: expected none, since {data} is sampled afresh for each batch, got {limit}")
        return SampledBatches(POINTS[data], batch_size, seed, device, processes)
    samples = load_images(data, data_dir=data_dir, limit=limit)
    return Prefetched(ShuffledBatches(samples, batch_size, seed, processes, noise=samples.scaling.noise), device)
