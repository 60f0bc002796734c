"""Sets of images: bytes in memory or on disk, converted to floats batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor


class Pixels(Protocol):
    """Images as bytes, (N, C, H, W), indexed by a tensor. Other types than Tensor have a ``fingerprint()``."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Scaling:
    """The map from bytes to floats: low + (high - low) byte / levels; batches get noise in [0, noise) on top."""

    levels: int = 255
    low: float = 0.0
    high: float = 1.0
    noise: float = 0.0

    def __call__(self, pixels: Tensor) -> Tensor:
        """Convert uint8 to float32."""
        return pixels.float().div_(self.levels).mul_(self.high - self.low).add_(self.low)


@dataclass(frozen=True)
class Chosen:
    """A subset of the pixels, in the order of ``indices``."""

    pixels: Pixels
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        return self.pixels[self.indices[chosen]]

    def fingerprint(self) -> str:
        return digest(self.pixels, self.indices)


@dataclass(frozen=True)
class ImageSet:
    """labels: (N,) from 0 to classes - 1, or None. Indexed by a tensor it returns floats, (n, C, H, W)."""

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
        """All images of a small set, (N, C, H, W) in float32."""
        return self[torch.arange(len(self))]

    def subset(self, chosen: Tensor) -> ImageSet:
        """The images with these indices, (n,)."""
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, pixels=Chosen(self.pixels, chosen), labels=labels)

    def fingerprint(self) -> str:
        """Hash of images and labels."""
        return digest(self.pixels, "" if self.labels is None else self.labels, repr(self.scaling))


def digest(*parts: Any) -> str:
    """Hash of tensors, texts and pixels."""
    total = blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            total.update(repr(tuple(part.shape)).encode())
            total.update(part.numpy().tobytes())
        else:
            total.update((part if isinstance(part, str) else part.fingerprint()).encode())
    return total.hexdigest()
