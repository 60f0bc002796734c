from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from unmeasured import NoQuality

from gptrainer import loop, plots
from gptrainer.config import TrainConfig
from gptrainer.metrics import classifier, quality
from gptrainer.systems import configure


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a run has by default; the count is put back, since a run sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small classifiers, samples and pictures: enough for every test but the one on the classifier itself."""
    monkeypatch.setattr(classifier, "EPOCHS", 2)
    monkeypatch.setattr(quality, "POINTS_TRANSPORTED", 100)
    monkeypatch.setattr(plots, "DPI", 40)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user's cache folder is to the tests: classifiers are trained once for all of them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def no_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which nothing depends on what samples are worth."""
    monkeypatch.setattr(loop, "build_quality", lambda *_, **__: NoQuality())


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes the config of a short run, with any values replaced."""

    def config(**values: Any) -> TrainConfig:
        small = {
            "algorithm": "wgan-gp",
            "data": "8gaussians",
            "steps": 4,
            "batch_size": 16,
            "width": 8,
            "n_critic": 2,
            "log_every": 1,
            "eval_every": 2,
            "out": tmp_path / "run",
        }
        return configure(**{**small, **values})

    return config


@pytest.fixture
def write_idx(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small Fashion-MNIST, 40 images to train on and 20 held out, and gives its folder."""

    def write(packed: bool = True) -> Path:
        folder = tmp_path / "idx"
        folder.mkdir()
        for prefix, count in (("train", 40), ("t10k", 20)):
            pixels, labels = np.arange(count * 784) % 256, np.arange(count) % 10
            for name, values, shape in (
                ("images-idx3", pixels, (count, 28, 28)),
                ("labels-idx1", labels, (count,)),
            ):
                head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
                content = head + values.astype(np.uint8).tobytes()
                path = folder / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
                path.write_bytes(gzip.compress(content) if packed else content)
        return folder

    return write


@pytest.fixture
def write_cifar(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small CIFAR-10, four images a file, and gives its folder."""

    def write(layout: str = "binary", inside: bool = True) -> Path:
        folder = tmp_path / layout
        place = folder / ("cifar-10-batches-bin" if layout == "binary" else "cifar-10-batches-py")
        place = place if inside else folder
        place.mkdir(parents=True)
        pixels = ((np.arange(4)[:, None] + np.arange(3072)) % 256).astype(np.uint8)
        labels = [(i + 3) % 10 for i in range(4)]
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            if layout == "binary":
                rows = np.column_stack([np.array(labels, np.uint8), pixels])
                (place / f"{name}.bin").write_bytes(rows.tobytes())
            else:
                (place / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=3))
        return folder

    return write


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes twelve images of several kinds and sizes in two subfolders, and gives their folder."""

    def write() -> Path:
        folder = tmp_path / "images"
        random = np.random.default_rng(0)
        for i in range(12):
            path = folder / "ab"[i // 6] / f"{i}.{('png', 'jpg', 'bmp')[i % 3] if i != 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = 40 + 3 * i, 70 - 2 * i
            pixels = random.integers(0, 256, (height, width) if i % 4 == 0 else (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        return folder

    return write
