"""Any folder of images, decoded when a batch asks for them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gptrainer.data.images import ImageSet, Scaling
from gptrainer.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def load_folder(folder: Path | None, size: int) -> ImageSet:
    """All images below a folder, their middle squares in [-1, 1]; subfolders, if all are in some, are classes."""
    if folder is None or not folder.is_dir():
        raise UserError(f"--data-dir: expected a folder of images, got {folder or 'none'}")
    names = np.array(sorted(_names(folder)))
    if not len(names):
        raise UserError(f"--data-dir: there is no image ({', '.join(ENDINGS)}) in {folder} or below")
    tops = np.array([Path(name).parts[0] if os.sep in name else "" for name in names])
    classes, labels = np.unique(tops, return_inverse=True)
    known = len(classes) > 1 and "" not in classes
    return ImageSet(
        FolderPixels(folder, names, size),
        torch.from_numpy(labels) if known else None,
        len(classes) if known else 0,
        Scaling(low=-1.0, high=1.0),
    )


class FolderPixels:
    """Images of a folder as (n, 3, size, size) bytes. names: below the folder, (N,)."""

    def __init__(self, folder: Path, names: np.ndarray, size: int) -> None:
        self.folder, self.names, self.size = folder, names, size
        self.decoders = ThreadPoolExecutor(max_workers=torch.get_num_threads(), thread_name_prefix="decoder")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        paths = (self.folder / name for name in self.names[chosen.numpy()])
        squares = list(self.decoders.map(partial(decode, size=self.size), paths))
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)

    def fingerprint(self) -> str:
        """By name, size and time of change, without reading the images."""
        total = blake2b(f"{self.folder.resolve()} {self.size}".encode(), digest_size=16)
        for name in self.names:
            about = (self.folder / name).stat()
            total.update(f"{name} {about.st_size} {about.st_mtime_ns}\n".encode())
        return total.hexdigest()


def decode(path: Path, size: int) -> np.ndarray:
    """The middle square of an image, (size, size, 3), in bytes."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # a JPEG need not be decoded in full for a small picture
            return np.array(ImageOps.fit(image.convert("RGB"), (size, size)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--data-dir: {path} cannot be read as an image: {error}") from error


def _names(folder: Path) -> list[str]:
    return [
        str((Path(place) / name).relative_to(folder))
        for place, _, files in os.walk(folder)
        for name in files
        if name.lower().endswith(ENDINGS) and not name.startswith(".")
    ]
