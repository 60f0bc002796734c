from __future__ import annotations

import gzip
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gpkernels.arguments import UserError
from gptrainer.data import load_batches, load_images
from gptrainer.data.readers import DEBIAN

CPU = torch.device("cpu")
Write = Callable[..., Path]


# --- IDX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["compressed", "plain"])
def test_fashion_mnist_is_read_from_idx_files(packed: bool, write_idx: Write) -> None:
    folder = write_idx(packed=packed)
    train = load_images("fashion-mnist", data_dir=folder)
    assert train.images.shape == (40, 1, 28, 28)
    assert train.labels is not None
    assert train.labels.tolist() == [i % 10 for i in range(40)]
    assert train.images[7, 0, 3, 5].item() == pytest.approx(((7 * 784 + 3 * 28 + 5) % 256) / 255)
    assert len(load_images("fashion-mnist", data_dir=folder, split="held-out")) == 20
    assert len(load_images("fashion-mnist", data_dir=folder, split="held-out", limit=10)) == 20


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's list of mapped files")
def test_plain_files_are_mapped_not_read(write_idx: Write) -> None:
    folder = write_idx(packed=False)
    images = load_images("fashion-mnist", data_dir=folder)
    assert f"{folder}/train-images-idx3-ubyte" in Path("/proc/self/maps").read_text()
    assert len(images) == 40


def test_a_folder_without_the_files_says_which_were_wanted_and_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(UserError) as failure:
        load_images("fashion-mnist", data_dir=tmp_path)
    for said in ("--data-dir", "train-images-idx3-ubyte.gz", str(tmp_path), "dataset-fashion-mnist"):
        assert said in str(failure.value)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-images-idx3-ubyte.gz", lambda b: b[: len(b) // 2]),
        ("train-images-idx3-ubyte.gz", lambda b: b"no archive"),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1])),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(b)[4:])),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 0))),
        ("train-labels-idx1-ubyte.gz", lambda b: b""),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 3) + b"\1\2\3")),
    ],
    ids=["cut off", "no archive", "a byte short", "floats", "empty set", "empty file", "too few labels"],
)
def test_a_damaged_idx_file_is_named(name: str, damage: Callable[[bytes], bytes], write_idx: Write) -> None:
    path = write_idx(packed=True) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"--data-dir: .*(train)"):
        load_images("fashion-mnist", data_dir=path.parent)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"needs {DEBIAN}, of Debian's package dataset-fashion-mnist")
def test_the_real_fashion_mnist_has_70000_pictures_of_ten_kinds() -> None:
    train, held_out = (load_images("fashion-mnist", split=split) for split in ("train", "held-out"))
    assert train.labels is not None
    assert held_out.labels is not None
    assert train.labels.bincount().tolist() == [6000] * 10
    assert held_out.labels.bincount().tolist() == [1000] * 10
    assert train[torch.arange(6000)].mean().item() == pytest.approx(0.286, abs=0.005)
    assert load_batches("fashion-mnist", 50, 0, CPU).next().shape == (50, 1, 28, 28)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["binary", "python"])
@pytest.mark.parametrize("inside", [True, False], ids=["in the archive's folder", "in the folder itself"])
def test_cifar10_is_read_from_both_layouts(layout: str, inside: bool, write_cifar: Write) -> None:
    images = load_images("cifar10", data_dir=write_cifar(layout=layout, inside=inside))
    assert images.labels is not None
    assert images.labels.tolist() == [(i + 3) % 10 for _ in range(5) for i in range(4)]
    expected = torch.arange(3072).remainder(256).view(3, 32, 32)  # red first, row by row, then green and blue
    assert torch.equal(images.pixels[torch.tensor([0])][0], expected.byte())
    assert torch.equal(images[torch.tensor([0])][0], 2 * (expected / 256 - 0.5))


def test_both_layouts_of_cifar10_hold_the_same(write_cifar: Write) -> None:
    binary, python = (load_images("cifar10", data_dir=write_cifar(layout=layout)) for layout in ("binary", "python"))
    assert torch.equal(binary.images, python.images)
    assert binary.fingerprint() == python.fingerprint()


def test_batches_of_cifar10_are_dequantised_as_in_the_code_of_wgan_gp(write_cifar: Write) -> None:
    batch = load_batches("cifar10", 20, 0, CPU, data_dir=write_cifar()).next()
    steps = (batch + 1) * 128  # pixel plus noise in [0, 1)
    assert len(steps.floor().unique()) == 256
    assert steps.frac().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_pickle_as_python_2_wrote_them_is_read(tmp_path: Path) -> None:
    pixels = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01b\x87tR"  # an empty array
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89"
        b"T" + struct.pack("<I", 3072) + pixels + b"tb"
    ).replace(b"(cnumpy\nndarray\nK\0\x85U\x01b\x87tR", b"cnumpy\nndarray\nK\0\x85U\x01b\x87R")
    written = b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x07eu."
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(written)
    images = load_images("cifar10", data_dir=tmp_path, split="held-out")
    assert images.labels is not None
    assert images.labels.tolist() == [7]
    assert bytes(images.pixels[torch.tensor([0])].flatten().tolist()) == pixels


class Trap:
    """Runs code when it is unpickled."""

    path = ""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path(Trap.path),)


def test_a_pickle_that_carries_code_is_refused_and_the_code_not_run(tmp_path: Path, write_cifar: Write) -> None:
    folder = write_cifar(layout="python", inside=False)
    Trap.path = str(tmp_path / "sprung")
    for content in (Trap(), {b"data": Trap(), b"labels": [1]}):
        (folder / "data_batch_3").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="data_batch_3 is damaged or not a batch of CIFAR-10: it asks for"):
            load_images("cifar10", data_dir=folder)
    assert not Path(Trap.path).exists()


@pytest.mark.parametrize("layout", ["binary", "python"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_batch_of_cifar10_is_named(layout: str, kept: float, write_cifar: Write) -> None:
    folder = write_cifar(layout=layout, inside=False)
    (path,) = folder.glob("data_batch_2*")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"--data-dir: .*data_batch_2"):
        load_images("cifar10", data_dir=folder)


@pytest.mark.parametrize("given", [True, False], ids=["an empty folder", "no folder"])
def test_missing_cifar10_says_what_is_wanted(given: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data-dir: cifar10 needs .*cifar-10-batches-"):
        load_images("cifar10", data_dir=tmp_path if given else None)


# --- a folder of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "size"), [("folder", 64), ("folder32", 32)])
def test_images_of_a_folder_become_squares_in_minus_one_to_one(data: str, size: int, write_folder: Write) -> None:
    images = load_images(data, data_dir=write_folder())
    assert images.images.shape == (12, 3, size, size)
    assert images.images.min() >= -1
    assert images.images.max() <= 1
    assert images.labels is not None
    assert images.labels.tolist() == [0] * 6 + [1] * 6  # of the subfolders, by name


def test_the_middle_of_an_oblong_image_is_kept(tmp_path: Path) -> None:
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, 64:128] = (255, 0, 51)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    images = load_images("folder", data_dir=tmp_path)
    assert images.labels is None
    middle = images.images[0, :, 8:56, 8:56]
    assert torch.allclose(middle, torch.tensor([1.0, -1.0, -0.6]).view(3, 1, 1).expand_as(middle), atol=1e-6)


def test_an_image_that_cannot_be_decoded_is_named_where_its_batch_is_wanted(write_folder: Write) -> None:
    folder = write_folder()
    (folder / "a" / "2.png").write_bytes(b"\x89PNG no more")
    batches = load_batches("folder", 12, 0, CPU, data_dir=folder)
    with pytest.raises(UserError, match=r"2\.png cannot be read as an image"):
        batches.next()


def test_a_folder_without_images_or_none_at_all_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, tmp_path / "absent", None):
        with pytest.raises(UserError, match="--data-dir"):
            load_images("folder", data_dir=folder)


def test_a_fingerprint_tells_folders_limits_and_changed_files_apart(write_folder: Write, tmp_path: Path) -> None:
    folder = write_folder()
    whole = load_images("folder", data_dir=folder).fingerprint()
    assert load_images("folder", data_dir=folder).fingerprint() == whole
    seen = {whole, load_images("folder32", data_dir=folder).fingerprint()}
    seen.add(load_images("folder", data_dir=folder, limit=5).fingerprint())
    (folder / "a" / "2.png").unlink()
    seen.add(load_images("folder", data_dir=folder).fingerprint())
    seen.add(load_images("folder", data_dir=Path(shutil.copytree(folder, tmp_path / "copy"))).fingerprint())
    assert len(seen) == 5
