"""Trained classifiers in the user's cache folder: one for each data set, whatever the seed of a run."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from gpkernels.arguments import replacing
from gptrainer.checkpoint import Damaged, pack, unpack
from gptrainer.data import ImageSet
from gptrainer.metrics import classifier
from gptrainer.metrics.classifier import Classifier, shape_of, train_classifier

VERSION = 3
SEED = 0
MOST = 50_000
NOTEWORTHY = 10_000


def classifier_of(name: str, images: ImageSet) -> Classifier:
    """Load the classifier of a data set from the cache, or train and cache it. A damaged file is replaced."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    shape = shape_of(images)
    with torch.device("meta"):  # for which no random number is drawn
        cached = Classifier(shape, images.classes or 4)
    settings = (VERSION, SEED, MOST, classifier.EPOCHS, classifier.IMAGES_SHOWN, classifier.BATCH)
    key = blake2b(f"{settings} {cached} {images.fingerprint()}".encode(), digest_size=8).hexdigest()
    path = Path(base) / "gpkernels" / "classifiers" / f"{name}-{key}.pt"
    try:
        cached.load_state_dict(unpack(path.read_bytes()), assign=True)
        return cached.requires_grad_(False)
    except (Damaged, OSError, TypeError, RuntimeError):
        data = _training_set(images)
    if len(data) > NOTEWORTHY:
        print(f"training the classifier of {name} once, for {path}", file=sys.stderr)
    trained = train_classifier(data, SEED)
    own = path.with_stem(f"{path.stem}-{os.getpid()}")  # parallel processes train the same classifier
    try:
        with replacing(own) as part:
            part.write_bytes(pack(trained.state_dict()))
        own.replace(path)
    except OSError as error:  # the run does not need the cache
        print(f"the classifier cannot be cached in {path.parent}: {error.strerror}", file=sys.stderr)
    return trained


@dataclass(frozen=True)
class Rotated:
    """Images rotated by a right angle as many times as their index says, modulo 4."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        pixels = self.images.pixels[chosen]
        return torch.stack([image.rot90(int(i) % 4, (1, 2)) for image, i in zip(pixels, chosen, strict=True)])


def _training_set(images: ImageSet) -> ImageSet:
    """At most MOST images with labels: their own, or their rotation."""
    if len(images) > MOST:
        # In random order, so that an index says nothing about the class.
        images = images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:MOST])
    if images.labels is not None:
        return images
    return replace(images, pixels=Rotated(images), labels=torch.arange(len(images)) % 4, classes=4)
