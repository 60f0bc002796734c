"""Any folder of images, decoded batch by batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpkernels.arguments import UserError
from gptrainer.data.images import Read

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def read(size: int, folder: Path | None, split: str) -> Read:
    """Find all images below a folder, to be read as central squares; subfolders are classes if all are in one."""
    if folder is None or not folder.is_dir():
        raise UserError(f"--data-dir: expected a folder of images, got {folder or 'none'}")
    images = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    paths = sorted(images, key=str)
    if not paths:
        raise UserError(f"--data-dir: no image ({', '.join(ENDINGS)}) found in {folder}")
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    classes, labels = np.unique(tops, return_inverse=True)
    known = len(classes) > 1 and "" not in classes
    return FolderPixels(np.array(paths), size), torch.from_numpy(labels) if known else None


class FolderPixels:
    """Images in files as (n, 3, size, size) bytes. paths: an array of them, (N,)."""

    def __init__(self, paths: np.ndarray, size: int) -> None:
        self.paths, self.size = paths, size
        self.decoders = ThreadPoolExecutor(max_workers=torch.get_num_threads(), thread_name_prefix="decoder")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: Tensor, /) -> Tensor:
        squares = list(self.decoders.map(partial(decode, size=self.size), self.paths[chosen.numpy()]))
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)

    def subset(self, chosen: Tensor) -> FolderPixels:
        return FolderPixels(self.paths[chosen.numpy()], self.size)

    def fingerprint(self) -> str:
        """Names, sizes and modification times; the images are not read."""
        files = [(path.resolve(), path.stat()) for path in self.paths]
        return f"{self.size}\n" + "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in files)


def decode(path: Path, size: int) -> np.ndarray:
    """Decode the central square of an image to bytes, (size, size, 3)."""
    from PIL import Image, ImageOps  # data sets are listed without it

    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # a JPEG need not be decoded in full for a small picture
            return np.array(ImageOps.fit(image.convert("RGB"), (size, size)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--data-dir: {path} cannot be read as an image: {error}") from error
