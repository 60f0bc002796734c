"""The small classifier whose features measure sample quality.

It is trained once for each data set, whatever the seed of a run, and kept in the user's cache folder.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpkernels.arguments import replacing
from gptrainer.checkpoint import Damaged, pack, unpack
from gptrainer.data import ImageSet, ShuffledBatches

VERSION = 3
SEED = 0
MOST = 50_000  # images to train on
NOTEWORTHY = 10_000
EPOCHS = 25
IMAGES_SHOWN = 150_000  # bound on EPOCHS times the images of a large set
BATCH = 64
CHUNK = 2048


class Classifier(nn.Module):
    """3x3 convolutions down to at most 8x8 pixels, and one dense layer, for images (C, H, W) = ``shape``.

    body: maps images to features (N, d); head: maps features to logits; accuracy: on held-out images.
    """

    accuracy: Tensor

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, side, _ = shape
        strides = [1, 2] if side <= 8 else [2] * max(2, math.ceil(math.log2(side / 8)))
        features = 32 if side <= 8 else 64
        layers: list[nn.Module] = []
        for stride in strides:
            out = 16 if not layers else 32
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.ReLU()]
            channels, side = out, math.ceil(side / stride)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, features), nn.ReLU())
        self.head = nn.Linear(features, classes)
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> NDArray[np.float64]:
        """Compute the penultimate layer, (N, d)."""
        return torch.cat([self.body(part) for part in images.split(CHUNK)]).double().numpy()

    @torch.no_grad()
    def scores(self, features: NDArray[np.float64]) -> Tensor:
        """Compute the logits of features, (N, classes)."""
        return self.head(torch.from_numpy(features).float())

    def classify(self, images: Tensor) -> Tensor:
        """Predict classes, (N,)."""
        return self.scores(self.features(images)).argmax(dim=1)


def classifier_of(name: str, images: ImageSet) -> Classifier:
    """Load the classifier of a data set from the cache, or train and cache it. A damaged file is replaced."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    shape = shape_of(images)
    with torch.device("meta"):  # for which no random number is drawn
        cached = Classifier(shape, images.classes or 4)
    settings = (VERSION, SEED, MOST, EPOCHS, IMAGES_SHOWN, BATCH)
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


def shape_of(data: ImageSet) -> tuple[int, ...]:
    return tuple(data[torch.tensor([0])].shape[1:])


def train_classifier(data: ImageSet, seed: int) -> Classifier:
    """Train on four fifths of the images and test on the rest; torch's global generator is not used."""
    from sklearn.model_selection import train_test_split  # seconds to import, and points need no classifier

    assert data.labels is not None
    enough = data.labels.bincount().min() >= 5  # for a fifth of each class
    train, held_out = train_test_split(
        torch.arange(len(data)).numpy(),
        test_size=0.2,
        stratify=data.labels.numpy() if enough else None,
        random_state=seed % 2**32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(shape_of(data), data.classes)
        batches = ShuffledBatches(torch.from_numpy(train), min(BATCH, len(train)), seed)
        steps = min(EPOCHS, math.ceil(IMAGES_SHOWN / len(train))) * (len(train) // batches.batch_size)
        optimiser = torch.optim.Adam(classifier.parameters(), lr=3e-3, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
        for _ in range(steps):
            batch = batches.next()
            optimiser.zero_grad()
            nn.functional.cross_entropy(classifier(data[batch]), data.labels[batch]).backward()
            optimiser.step()
            schedule.step()
    chunks = torch.from_numpy(held_out).split(CHUNK)
    right = sum(int((classifier.classify(data[part]) == data.labels[part]).sum()) for part in chunks)
    classifier.accuracy.fill_(right / len(held_out))
    return classifier.requires_grad_(False)
