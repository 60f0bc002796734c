"""Fashion-MNIST, from the IDX files that it is distributed in."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpkernels.arguments import UserError
from gptrainer.data.images import Read

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PREFIX = {"train": "train", "held-out": "t10k"}
UNSIGNED_BYTES = 8


def read(folder: Path | None, split: str) -> Read:
    """Read 28x28 images, 60,000 for training and 10,000 held out."""
    folder, prefix = folder or DEBIAN, PREFIX[split]
    pixels = _read(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte", 1).long()
    if len(pixels) != len(labels) or pixels.shape[1:] != (28, 28) or labels.max() > 9:
        raise UserError(f"--data-dir: the {prefix} files in {folder} are not those of Fashion-MNIST")
    return pixels.unsqueeze(1), labels


def _read(folder: Path, name: str, dims: int) -> Tensor:
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
