"""Labelled images for semi-supervised training, and how often a classifier errs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from gptrainer.data import ImageSet, ShuffledBatches, load_digits
from gptrainer.errors import UserError


def split(data: str, seed: int) -> tuple[ImageSet, ImageSet]:
    """Four fifths of a data set to train on and the rest to measure on; UserError if it has no labels."""
    if data != "digits":
        raise UserError(f"--data: ssl-ct-gan needs data with labels, such as digits, got {data}")
    images = load_digits()
    assert images.labels is not None
    train, held_out = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=images.labels.numpy(), random_state=seed % 2**32
    )
    return images.subset(torch.from_numpy(train)), images.subset(torch.from_numpy(held_out))


class LabelledBatches:
    """Endless batches of the few images of each class that keep their labels."""

    def __init__(self, data: ImageSet, per_class: int, size: int, seed: int, device: torch.device) -> None:
        assert data.labels is not None
        chosen = few_of_each_class(data.labels, per_class, seed)
        self.images, self.labels = data[chosen].to(device), data.labels[chosen].to(device)
        self.order = ShuffledBatches(torch.arange(len(chosen)), min(size, len(chosen)), seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """(n, C, H, W) and (n,)."""
        chosen = self.order.next().to(self.labels.device)
        return self.images[chosen], self.labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)


def few_of_each_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of so many random samples of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [order[labels[order] == label] for label in labels.unique()]
    fewest = min(map(len, of_class))
    if count > fewest:
        raise UserError(f"--labels-per-class: expected at most the {fewest} of the rarest class, got {count}")
    return torch.cat([indices[:count] for indices in of_class])


def error_rate(classifier: nn.Module, images: ImageSet, device: torch.device) -> float:
    """The share of images that a classifier, in evaluation mode, takes for another class."""
    training = classifier.training
    classifier.eval()
    with torch.no_grad():
        logits = torch.cat([classifier(part.to(device)) for part in images.images.split(1024)])
    classifier.train(training)
    return (logits.argmax(1).cpu() != images.labels).double().mean().item()
