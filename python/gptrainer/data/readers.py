"""Readers of the sets of images, from the files that they are distributed in."""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpkernels.arguments import UserError
from gptrainer.data.images import Read

# Fashion-MNIST
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PREFIX = {"train": "train", "held-out": "t10k"}
UNSIGNED_BYTES = 8
# CIFAR-10
PIXELS = 3 * 32 * 32
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "held-out": ["test_batch"]}
ARRAYS = (
    "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip
Part = tuple[np.ndarray, np.ndarray]
# folders
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def digits(folder: Path | None, split: str) -> Read:
    """Read scikit-learn's 1,797 handwritten digits of 8x8 pixels with 17 shades, which need no folder."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.uint8).unsqueeze(1), torch.tensor(digits.target, dtype=torch.int64)


def fashion_mnist(folder: Path | None, split: str) -> Read:
    """Read 28x28 images, 60,000 for training and 10,000 held out."""
    folder, prefix = folder or DEBIAN, PREFIX[split]
    pixels = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).long()
    if len(pixels) != len(labels) or pixels.shape[1:] != (28, 28) or labels.max() > 9:
        raise UserError(f"--data-dir: the {prefix} files in {folder} are not those of Fashion-MNIST")
    return pixels.unsqueeze(1), labels


def _read_idx(folder: Path, name: str, dims: int) -> Tensor:
    """Read a compressed IDX file of bytes, or map a plain one.

    It has two zeros, the type, the number of axes, their lengths as big-endian 32-bit numbers, and the values.
    """
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.is_file() and not packed.is_file():
        raise UserError(
            f"--data-dir: fashion-mnist needs {name} or {name}.gz, and {folder} has neither; install Debian's "
            "package dataset-fashion-mnist, or name a folder with the four IDX files"
        )
    try:
        if plain.is_file():
            content: np.ndarray = np.memmap(plain, np.uint8, mode="c")  # copy on write: torch wants writable arrays
        else:
            content = np.frombuffer(bytearray(gzip.decompress(packed.read_bytes())), np.uint8)
        begin = 4 + 4 * dims
        if len(content) < begin or content[:4].tolist() != [0, 0, UNSIGNED_BYTES, dims]:
            raise ValueError(f"not an IDX file of bytes with {dims} axes")
        shape = content[4:begin].view(">u4").tolist()
        if len(content) - begin != math.prod(shape) or not shape[0]:
            raise ValueError(f"expected {' x '.join(map(str, shape))} values, got {len(content) - begin}")
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise UserError(f"--data-dir: {name} in {folder} is damaged: {error}") from error
    return torch.from_numpy(content[begin:].reshape(shape))


def cifar10(folder: Path | None, split: str) -> Read:
    """Read 32x32 images, 50,000 for training and 10,000 held out."""
    if folder is None:
        raise UserError(
            "--data-dir: cifar10 needs the folder that contains cifar-10-batches-py or cifar-10-batches-bin"
        )
    parts = [_read_batch(folder, name) for name in FILES[split]]
    sizes = [len(labels) for _, labels in parts]
    if min(sizes) != max(sizes):  # whole records may be missing
        raise UserError(f"--data-dir: {FILES[split][sizes.index(min(sizes))]} in {folder} is cut off")
    pixels, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return pixels.view(-1, 3, 32, 32), labels.long()


def _read_batch(folder: Path, name: str) -> Part:
    for inner in ("", "cifar-10-batches-bin", "cifar-10-batches-py"):
        for path, read in ((folder / inner / f"{name}.bin", _read_binary), (folder / inner / name, _read_pickle)):
            if path.is_file():
                pixels, labels = read(path)
                if not len(labels) or pixels.shape != (len(labels), PIXELS) or labels.max() > 9:
                    raise UserError(f"--data-dir: {path} is not a batch of CIFAR-10")
                return pixels, labels
    raise UserError(
        f"--data-dir: cifar10 needs {name}.bin or {name}, and neither is in {folder} or its subfolders "
        "cifar-10-batches-bin and cifar-10-batches-py; the archives are at https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _read_binary(path: Path) -> Part:
    """Read records of a label and 3,072 pixels."""
    content = np.fromfile(path, np.uint8)
    if len(content) % (1 + PIXELS):
        raise UserError(f"--data-dir: {path} is damaged: its size is not a multiple of {1 + PIXELS} bytes")
    records = content.reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(path: Path) -> Part:
    """Read a dictionary with an array ``data`` and a list ``labels``."""
    try:
        with path.open("rb") as file:
            content: Any = _Unpickler(file, encoding="bytes").load()
        return content[b"data"].astype(np.uint8).reshape(-1, PIXELS), np.array(content[b"labels"], np.uint8)
    except OSError:
        raise
    except Exception as error:  # unpickling fails in many ways
        raise UserError(f"--data-dir: {path} is damaged or not a batch of CIFAR-10: {error}") from error


class _Unpickler(pickle.Unpickler):
    """An unpickler of NumPy arrays that refuses every other name before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def images(size: int, folder: Path | None, split: str) -> Read:
    """Find all images below a folder, to be read as central squares; subfolders are classes if all are in one."""
    if folder is None or not folder.is_dir():
        raise UserError(f"--data-dir: expected a folder of images, got {folder or 'none'}")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    paths = sorted(files, key=str)
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
