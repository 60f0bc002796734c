"""Data sets and endless seeded batches of them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gpkernels.arguments import UserError
from gptrainer.data.batches import Batches, Prefetched, SampledBatches, Shard, ShuffledBatches
from gptrainer.data.cifar import load_cifar10
from gptrainer.data.folder import load_folder
from gptrainer.data.idx import load_fashion_mnist
from gptrainer.data.images import ImageSet, load_digits
from gptrainer.data.points import MIXTURES, POINTS, Mixture

__all__ = [
    "DATASETS", "MIXTURES", "POINTS", "Batches", "DataSet", "ImageSet", "Mixture", "SampledBatches", "Shard",
    "ShuffledBatches", "Split", "load_batches", "load_digits", "load_images",
]  # fmt: skip

Split = Literal["train", "held-out"]
UNIT, SIGNED = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True)
class DataSet:
    """shape: of one sample; range: of the values of a pixel; classes: number of classes, 0 without labels.

    tested: whether there are test images.
    """

    description: str
    kind: Literal["points", "images"]
    shape: tuple[int, ...]
    range: tuple[float, float] = UNIT
    classes: int = 0
    tested: bool = False


DATASETS = {
    "8gaussians": DataSet("a ring of eight Gaussians, sigma .014", "points", (2,)),
    "25gaussians": DataSet("a grid of 25 Gaussians, sigma .018", "points", (2,)),
    "swissroll": DataSet("a spiral with noise", "points", (2,)),
    "ring": DataSet("eight narrow Gaussians, sigma .01, on the unit circle", "points", (2,)),
    "lines": DataSet("the segment (0, u), u uniform in [0, 1]", "points", (2,)),
    "dirac": DataSet("all mass at 0", "points", (1,)),
    "digits": DataSet("1,797 handwritten digits, with scikit-learn", "images", (1, 8, 8), classes=10),
    "fashion-mnist": DataSet("70,000 pictures of clothes, from IDX files", "images", (1, 28, 28), UNIT, 10, True),
    "cifar10": DataSet("60,000 photographs in ten classes, from local files", "images", (3, 32, 32), SIGNED, 10, True),
    "folder": DataSet("any folder of images, cropped to squares of 64 pixels", "images", (3, 64, 64), SIGNED),
    "folder32": DataSet("any folder of images, cropped to squares of 32 pixels", "images", (3, 32, 32), SIGNED),
}

_LOADERS: dict[str, Callable[[Path | None, Split], ImageSet]] = {
    "digits": lambda folder, split: load_digits(),
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "folder": lambda folder, split: load_folder(folder, 64),
    "folder32": lambda folder, split: load_folder(folder, 32),
}


def load_images(
    data: str, *, data_dir: Path | None = None, split: Split = "train", limit: int | None = None
) -> ImageSet:
    """Load the images of a data set. UserError names the option that is wrong.

    limit: number of training images. Held out are the test images or, where there are none, those beyond the limit.
    """
    images = _LOADERS[data](data_dir, split)
    if split == "held-out" and DATASETS[data].tested:
        return images
    if limit is not None and not 0 < limit <= len(images):
        raise UserError(f"--limit: expected a number from 1 to the {len(images)} images of {data}, got {limit}")
    if split == "train":
        return images if limit is None else images.subset(torch.arange(limit))
    if limit is None or limit == len(images):
        raise UserError(f"--limit: expected fewer than all images, since {data} has no test images to hold out")
    return images.subset(torch.arange(limit, len(images)))


def load_batches(
    data: str,
    batch_size: int,
    seed: int,
    device: torch.device,
    *,
    data_dir: Path | None = None,
    split: Split = "train",
    limit: int | None = None,
    shard: Shard = (0, 1),
) -> Batches:
    """Make endless batches of a data set. Images are shuffled in each epoch and prepared in advance by a thread.

    batch_size: over all processes, a multiple of their number; together they get the batches of one process.
    """
    if DATASETS[data].kind == "points":
        if limit is not None:
            raise UserError(f"--limit: expected none, since {data} is sampled afresh for each batch, got {limit}")
        return SampledBatches(POINTS[data], batch_size, seed, device, shard)
    images = load_images(data, data_dir=data_dir, split=split, limit=limit)
    return Prefetched(ShuffledBatches(images, batch_size, seed, shard, noise=images.scaling.noise), device)
