"""The handwritten digits that ship with scikit-learn."""

from __future__ import annotations

import torch

from gptrainer.data.images import ImageSet, Scaling


def load_digits() -> ImageSet:
    """Load 1,797 images of 8x8 pixels with 17 shades, scaled to [0, 1]."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    pixels = torch.tensor(bunch.images, dtype=torch.uint8).unsqueeze(1)
    return ImageSet(pixels, torch.tensor(bunch.target, dtype=torch.int64), 10, Scaling(levels=16))
