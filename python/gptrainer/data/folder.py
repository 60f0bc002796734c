"""Any folder of images, decoded batch by batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpkernels.arguments import UserError
from gptrainer.data.images import ImageSet, Scaling

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def load_folder(folder: Path | None, size: int) -> ImageSet:
    """Load the central squares of all images below a folder, in [-1, 1]; subfolders are classes if all are in one."""
    if folder is None or not folder.is_dir():
        raise UserError(f"--data-dir: expected a folder of images, got {folder or 'none'}")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in ENDINGS]
    names = sorted(str(file) for file in files if not file.name.startswith("."))
    if not names:
        raise UserError(f"--data-dir: no image ({', '.join(ENDINGS)}) found in {folder}")
    tops = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
    classes, labels = np.unique(tops, return_inverse=True)
    known = len(classes) > 1 and "" not in classes
    return ImageSet(
        FolderPixels(folder, np.array(names), size),
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

    def subset(self, chosen: Tensor) -> FolderPixels:
        """The images with these indices, (n,)."""
        return FolderPixels(self.folder, self.names[chosen.numpy()], self.size)

    def fingerprint(self) -> str:
        """Names, sizes and modification times; the images are not read."""
        files = [(str(name), (self.folder / name).stat()) for name in self.names]
        listing = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in files)
        return f"{self.folder.resolve()} {self.size}\n{listing}"


def decode(path: Path, size: int) -> np.ndarray:
    """Decode the central square of an image to bytes, (size, size, 3)."""
    from PIL import Image, ImageOps  # data sets are listed without it

    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # a JPEG need not be decoded in full for a small picture
            return np.array(ImageOps.fit(image.convert("RGB"), (size, size)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--data-dir: {path} cannot be read as an image: {error}") from error
