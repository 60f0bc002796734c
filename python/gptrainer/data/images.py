"""Sets of images: bytes in memory or on disk, converted to floats batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor


class Indexed(Protocol):
    """Samples that are indexed by a tensor: a tensor, or images on disk, which have ``subset`` and ``fingerprint``."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor, /) -> Tensor: ...


Read = tuple[Indexed, Tensor | None]  # bytes, (N, C, H, W), and labels, (N,) from 0 up, or None


@dataclass(frozen=True)
class Scaling:
    """The map from bytes to floats: low + (1 - low) byte / levels; batches get noise in [0, noise) on top."""

    levels: int = 255
    low: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class ImageSet:
    """Images as bytes, (N, C, H, W), which are floats once indexed by a tensor.

    labels: (N,) from 0 to classes - 1, or None.
    """

    pixels: Indexed
    labels: Tensor | None
    classes: int
    scaling: Scaling

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        levels, low = self.scaling.levels, self.scaling.low
        return self.pixels[chosen].float().div_(levels).mul_(1.0 - low).add_(low)

    @property
    def images(self) -> Tensor:
        """All images of a small set, (N, C, H, W) in float32."""
        return self[torch.arange(len(self))]

    def subset(self, chosen: Tensor) -> ImageSet:
        """The images with these indices, (n,)."""
        pixels: Any = self.pixels
        fewer = pixels[chosen] if isinstance(pixels, Tensor) else pixels.subset(chosen)
        return replace(self, pixels=fewer, labels=None if self.labels is None else self.labels[chosen])

    def fingerprint(self) -> str:
        """Hash of images, labels and scaling; of images on disk only the names, sizes and times are hashed."""
        pixels: Any = self.pixels
        total = blake2b(repr(self.scaling).encode(), digest_size=16)
        for part in (pixels if isinstance(pixels, Tensor) else pixels.fingerprint(), self.labels):
            total.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        return total.hexdigest()
