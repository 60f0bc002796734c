"""Labelled batches of semi-supervised training, and the error rate of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.arguments import UserError
from gptrainer.data import ImageSet, ShuffledBatches


class LabelledBatches:
    """Endless batches of the few labelled images of each class."""

    def __init__(self, data: ImageSet, per_class: int, size: int, seed: int, device: torch.device) -> None:
        if data.labels is None:
            raise UserError("--data: ssl-ct-gan needs images with labels")
        chosen = few_of_each_class(data.labels, per_class, seed)
        self.images, self.labels = data[chosen].to(device), data.labels[chosen].to(device)
        self.order = ShuffledBatches(torch.arange(len(chosen)), min(size, len(chosen)), seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Return images, (n, C, H, W), and labels, (n,)."""
        chosen = self.order.next().to(self.labels.device)
        return self.images[chosen], self.labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)


def few_of_each_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw the indices of ``count`` samples of each class, (classes * count,)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [order[labels[order] == label] for label in labels.unique()]
    fewest = min(map(len, of_class))
    if count > fewest:
        raise UserError(f"--labels-per-class: expected at most {fewest}, the size of the smallest class, got {count}")
    return torch.cat([indices[:count] for indices in of_class])


def error_rate(classifier: nn.Module, images: ImageSet, device: torch.device) -> float:
    """Share of images that a classifier misclassifies in evaluation mode."""
    assert images.labels is not None
    training = classifier.training
    classifier.eval()
    with torch.no_grad():
        parts = torch.arange(len(images)).split(1024)
        guesses = torch.cat([classifier(images[part].to(device)).argmax(1).cpu() for part in parts])
    classifier.train(training)
    return (guesses != images.labels).double().mean().item()
