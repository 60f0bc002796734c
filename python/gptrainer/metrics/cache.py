"""Trained classifiers, kept in the user's cache folder: one for each data set, whatever the seed of a run."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gptrainer.data import ImageSet
from gptrainer.files import replacing
from gptrainer.metrics import classifier
from gptrainer.metrics.classifier import Classifier, frozen, shape_of, train_classifier, untrained

VERSION = 1
SEED = 0
MOST = 50_000
WORTH_SAYING = 10_000


def classifier_of(name: str, images: ImageSet) -> Classifier:
    """The classifier of a data set: from the cache, or trained and then kept there. A damaged file is replaced."""
    path = _folder() / f"{name}-{_key(images)}.safetensors"
    data = _to_learn_from(images)
    kept = _load(path, data)
    if kept is not None:
        return kept
    if len(data) > WORTH_SAYING:
        print(f"training the classifier of {name} once, for {path}", file=sys.stderr)
    trained = train_classifier(data, SEED)
    _save(path, trained)
    return trained


@dataclass(frozen=True)
class Turned:
    """Images turned by a right angle as many times as their index says, modulo 4."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        pixels = self.images.pixels[chosen]
        return torch.stack([image.rot90(int(i) % 4, (1, 2)) for image, i in zip(pixels, chosen, strict=True)])


def _to_learn_from(images: ImageSet) -> ImageSet:
    """At most MOST images, with labels: their own, or how far they are turned."""
    if len(images) > MOST:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:MOST]
        # Not in the order of the file, so that an index says nothing about the class.
        images = images.subset(chosen)
    if images.labels is not None:
        return images
    return replace(images, pixels=Turned(images), labels=torch.arange(len(images)) % 4, classes=4)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpkernels" / "classifiers"


def _key(images: ImageSet) -> str:
    """Of all that a trained classifier depends on."""
    settings = (VERSION, SEED, MOST, classifier.EPOCHS, classifier.IMAGES_SHOWN, classifier.BATCH)
    return blake2b(
        f"{settings} {_without_weights(images, images.classes or 4)} {images.fingerprint()}".encode(), digest_size=8
    ).hexdigest()


def _load(path: Path, data: ImageSet) -> Classifier | None:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["digest"] != _digest(weights, about["accuracy"]):
            return None
        body, head = _without_weights(data, data.classes)
        nn.ModuleDict({"body": body, "head": head}).load_state_dict(weights, assign=True)
        return frozen(body, head, float(about["accuracy"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _without_weights(data: ImageSet, classes: int) -> tuple[nn.Module, nn.Module]:
    """(body, head), for which no random number is drawn."""
    shape = shape_of(data)
    with torch.device("meta"):
        return untrained(shape, classes)


def _save(path: Path, trained: Classifier) -> None:
    weights = nn.ModuleDict({"body": trained.body, "head": trained.head}).state_dict()
    accuracy = repr(trained.accuracy)
    try:
        with replacing(path.with_stem(f"{path.stem}-{os.getpid()}")) as part:  # processes side by side train the same
            save_file(weights, part, metadata={"accuracy": accuracy, "digest": _digest(weights, accuracy)})
        path.with_stem(f"{path.stem}-{os.getpid()}").replace(path)
    except OSError as error:  # the run can do without
        print(f"the classifier cannot be kept in {path.parent}: {error.strerror}", file=sys.stderr)


def _digest(weights: dict[str, Tensor], accuracy: str) -> str:
    total = blake2b(accuracy.encode(), digest_size=16)
    for name in sorted(weights):
        total.update(name.encode() + weights[name].numpy().tobytes())
    return total.hexdigest()
