"""Any folder of images, decoded batch by batch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpkernels.arguments import UserError
from gptrainer.data.images import ImageSet, Scaling, digest

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def load_folder(folder: Path | None, size: int) -> ImageSet:
    """Load the central squares of all images below a folder, in [-1, 1]; subfolders are classes if all are in one."""
    if folder is None or not folder.is_dir():
        raise UserError(f"--data-dir: expected a folder of images, got {folder or 'none'}")
    names = np.array(sorted(_names(folder)))
    if not len(names):
        raise UserError(f"--data-dir: no image ({', '.join(ENDINGS)}) found in {folder}")
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
    """Images of a folder as (n, 3, size, size) bytes. names: relative to the folder, (N,)."""

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
        """Hash of names, sizes and modification times; the images are not read."""
        files = [(str(name), (self.folder / name).stat()) for name in self.names]
        listing = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in files)
        return digest(f"{self.folder.resolve()} {self.size}\n{listing}")


def decode(path: Path, size: int) -> np.ndarray:
    """Decode the central square of an image to bytes, (size, size, 3)."""
    from PIL import Image, ImageOps  # data sets are listed without it

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
