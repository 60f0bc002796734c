"""CIFAR-10, from the files that it is distributed in: pickled batches for Python, or plain binary ones."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpkernels.arguments import UserError
from gptrainer.data.images import Read

PIXELS = 3 * 32 * 32
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "held-out": ["test_batch"]}
ARRAYS = (
    "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip

Part = tuple[np.ndarray, np.ndarray]


def read(folder: Path | None, split: str) -> Read:
    """Read 32x32 images, 50,000 for training and 10,000 held out."""
    if folder is None:
        raise UserError(
            "--data-dir: cifar10 needs the folder that contains cifar-10-batches-py or cifar-10-batches-bin"
        )
    parts = [_read(folder, name) for name in FILES[split]]
    sizes = [len(labels) for _, labels in parts]
    if min(sizes) != max(sizes):  # whole records may be missing
        raise UserError(f"--data-dir: {FILES[split][sizes.index(min(sizes))]} in {folder} is cut off")
    pixels, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return pixels.view(-1, 3, 32, 32), labels.long()


def _read(folder: Path, name: str) -> Part:
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
