"""Sets of images: bytes in memory or on disk, made into numbers a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor


class Pixels(Protocol):
    """Images as bytes, (N, C, H, W), of which some are asked for at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor, /) -> Tensor: ...


class Fingerprinted(Protocol):
    """Pixels that tell by themselves what they are."""

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Scaling:
    """From bytes to numbers: low + (high - low) byte / levels; batches get noise in [0, noise) on top."""

    levels: int = 255
    low: float = 0.0
    high: float = 1.0
    noise: float = 0.0

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 to float32."""
        return pixels.float().div_(self.levels).mul_(self.high - self.low).add_(self.low)


@dataclass(frozen=True)
class Chosen:
    """Some of the pixels, in the order of ``indices``."""

    pixels: Pixels
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        return self.pixels[self.indices[chosen]]

    def fingerprint(self) -> str:
        return _digest(_fingerprint(self.pixels).encode(), self.indices.numpy())


@dataclass(frozen=True)
class ImageSet:
    """labels: (N,) from 0 to classes - 1, or None. Indexed by a tensor it gives floats, (n, C, H, W)."""

    pixels: Pixels
    labels: Tensor | None
    classes: int
    scaling: Scaling = Scaling()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        return self.scaling(self.pixels[chosen])

    @property
    def images(self) -> Tensor:
        """All of them, (N, C, H, W) in float32: for small sets."""
        return self[torch.arange(len(self))]

    def subset(self, chosen: Tensor) -> ImageSet:
        """The images with these indices, (n,)."""
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, pixels=Chosen(self.pixels, chosen), labels=labels)

    def fingerprint(self) -> str:
        """Tells one set of images and labels from another."""
        labels = b"" if self.labels is None else self.labels.numpy()
        return _digest(_fingerprint(self.pixels).encode(), labels, repr(self.scaling).encode())


def _fingerprint(pixels: Pixels) -> str:
    if isinstance(pixels, Tensor):
        return _digest(repr(tuple(pixels.shape)).encode(), pixels.numpy())
    own: Fingerprinted = pixels  # type: ignore[assignment]
    return own.fingerprint()


def _digest(*parts: object) -> str:
    total = blake2b(digest_size=16)
    for part in parts:
        total.update(part)  # type: ignore[arg-type]
    return total.hexdigest()
