"""The small classifier in whose features sample quality is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from gptrainer.data import LabelledImages, ShuffledBatches

FEATURES = 32
EPOCHS = 25
BATCH = 64


@dataclass(frozen=True)
class Classifier:
    """body: images to features (N, 32); head: features to class scores; accuracy: on held-out images."""

    body: nn.Module
    head: nn.Module
    accuracy: float

    def features(self, images: Tensor) -> NDArray[np.float64]:
        """The penultimate layer, (N, 32)."""
        with torch.no_grad():
            return self.body(images).double().numpy()

    def classify(self, images: Tensor) -> Tensor:
        """The likeliest classes, (N,)."""
        with torch.no_grad():
            return self.head(self.body(images)).argmax(dim=1)


def train_classifier(data: LabelledImages, seed: int) -> Classifier:
    """Train on four fifths of the images and measure on the rest; torch's global generator is left as it was."""
    train, held_out = train_test_split(
        np.arange(len(data.labels)), test_size=0.2, stratify=data.labels.numpy(), random_state=seed % 2**32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
            nn.ReLU(),
        )
        head = nn.Linear(FEATURES, data.classes)
        _fit(nn.Sequential(body, head), data, torch.from_numpy(train), seed)
    for parameter in [*body.parameters(), *head.parameters()]:
        parameter.requires_grad_(False)
    classifier = Classifier(body, head, 0.0)
    right = classifier.classify(data.images[held_out]) == data.labels[held_out]
    return Classifier(body, head, right.double().mean().item())


def _fit(model: nn.Module, data: LabelledImages, chosen: Tensor, seed: int) -> None:
    steps = EPOCHS * (len(chosen) // BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    batches = ShuffledBatches(chosen, BATCH, seed)
    for _ in range(steps):
        batch = batches.next()
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
        optimiser.step()
        schedule.step()
