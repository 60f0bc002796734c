"""Trained classifiers in the user's cache folder: one for each data set, whatever the seed of a run."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from gptrainer.data import ImageSet
from gptrainer.files import Damaged, pack, replacing, unpack
from gptrainer.metrics import classifier
from gptrainer.metrics.classifier import Classifier, frozen, shape_of, train_classifier, untrained

VERSION = 2
SEED = 0
MOST = 50_000
NOTEWORTHY = 10_000


def classifier_of(name: str, images: ImageSet) -> Classifier:
    """Load the classifier of a data set from the cache, or train and cache it. A damaged file is replaced."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "gpkernels" / "classifiers" / f"{name}-{_key(images)}.pt"
    data = _training_set(images)
    cached = _load(path, data)
    if cached is not None:
        return cached
    if len(data) > NOTEWORTHY:
        print(f"training the classifier of {name} once, for {path}", file=sys.stderr)
    trained = train_classifier(data, SEED)
    _save(path, trained)
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


def _key(images: ImageSet) -> str:
    """Hash of everything that a trained classifier depends on."""
    settings = (VERSION, SEED, MOST, classifier.EPOCHS, classifier.IMAGES_SHOWN, classifier.BATCH)
    network = _without_weights(images, images.classes or 4)
    return blake2b(f"{settings} {network} {images.fingerprint()}".encode(), digest_size=8).hexdigest()


def _load(path: Path, data: ImageSet) -> Classifier | None:
    try:
        state = unpack(path.read_bytes())
        network = _without_weights(data, data.classes)
        network.load_state_dict(state["weights"], assign=True)
        return frozen(network["body"], network["head"], float(state["accuracy"]))
    except (Damaged, OSError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _without_weights(data: ImageSet, classes: int) -> nn.ModuleDict:
    """The network on the meta device, for which no random number is drawn."""
    shape = shape_of(data)
    with torch.device("meta"):
        body, head = untrained(shape, classes)
    return nn.ModuleDict({"body": body, "head": head})


def _save(path: Path, trained: Classifier) -> None:
    weights = nn.ModuleDict({"body": trained.body, "head": trained.head}).state_dict()
    own = path.with_stem(f"{path.stem}-{os.getpid()}")  # parallel processes train the same classifier
    try:
        with replacing(own) as part:
            part.write_bytes(pack({"weights": weights, "accuracy": trained.accuracy}))
        own.replace(path)
    except OSError as error:  # the run does not need the cache
        print(f"the classifier cannot be cached in {path.parent}: {error.strerror}", file=sys.stderr)
