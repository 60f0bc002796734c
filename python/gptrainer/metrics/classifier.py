"""The small classifier whose features measure sample quality."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptrainer.data import ImageSet, ShuffledBatches

EPOCHS = 25
IMAGES_SHOWN = 150_000
"""Bound on EPOCHS times the images of a large set."""
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
        """Compute the logits, (N, classes)."""
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


def shape_of(data: ImageSet) -> tuple[int, ...]:
    """Shape of an image, (C, H, W)."""
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
        _fit(classifier, data, data.labels, torch.from_numpy(train), seed)
    chunks = torch.from_numpy(held_out).split(CHUNK)
    right = sum(int((classifier.classify(data[part]) == data.labels[part]).sum()) for part in chunks)
    classifier.accuracy.fill_(right / len(held_out))
    return classifier.requires_grad_(False)


def _fit(model: nn.Module, data: ImageSet, labels: Tensor, chosen: Tensor, seed: int) -> None:
    batch_size = min(BATCH, len(chosen))
    steps = min(EPOCHS, math.ceil(IMAGES_SHOWN / len(chosen))) * (len(chosen) // batch_size)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    batches = ShuffledBatches(chosen, batch_size, seed)
    for _ in range(steps):
        batch = batches.next()
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data[batch]), labels[batch]).backward()
        optimiser.step()
        schedule.step()
