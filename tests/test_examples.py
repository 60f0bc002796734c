"""Every program of examples/ runs in a few steps, prints finite results and writes its files."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch.distributed as dist

import installed

EXAMPLES = sorted((installed.ROOT / "examples").glob("*.py"))
README = (installed.ROOT / "examples" / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)(?![\w.]*\w)", re.IGNORECASE)

# What each is given, where that is not SHORT.
SHORT = ("--steps", "4")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "siren": ("--steps", "20"),
}
# What each writes.
WRITES: dict[str, set[str]] = {
    "amp": {"amp.csv", "amp.png"},
    "augmented_r1": {"augmented_r1.png"},
    "conditional_r1": {"conditional_r1.png"},
    "distributed": {"distributed.csv"},
    "force_field": {"force_field.csv", "force_field.png"},
    "language": {"language.csv", "language.txt"},
    "policy_smoothness": {"policy_smoothness.csv", "policy_smoothness.png"},
    "ctgan": {"ctgan.csv", "ctgan.png"},
    "r3gan": {"r3gan.csv", "r3gan.png"},
    "sdf": {"sdf.obj", "sdf.png"},
    "siren": {"siren.png"},
    "wgan_gp": {"wgan_gp.csv", "wgan_gp.png"},
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_finite_results_and_writes_its_files(path: Path, tmp_path: Path) -> None:
    arguments = ARGUMENTS.get(path.stem, SHORT)
    done = installed.run(str(path), *arguments, "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    numbers = [float(number) for number in NUMBER.findall(done.stdout)]
    assert numbers, done.stdout
    assert all(math.isfinite(number) for number in numbers), done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # it writes nowhere else
    written = {file.name for file in (tmp_path / "out").iterdir() if file.stat().st_size > 100}
    assert written == WRITES[path.stem]


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(engine: str, tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    program = str(installed.ROOT / "examples" / "distributed.py")
    done = installed.run(*launch, program, "--engine", engine, *SHORT, "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"processes: 2, difference of gradients from one process: (\S+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) < 1e-12
    assert len((tmp_path / "distributed.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_says_what_it_shows_and_is_listed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.startswith('"""')
    assert f"python examples/{path.name}" in text.split('"""')[1]
    assert f"]({path.name})" in README


def test_numbers_that_are_not_finite_are_found() -> None:
    found = NUMBER.findall("step 3: loss 1.5e-3, R1 nan, R2 -inf, information 8x8, 61.5 %")
    assert found == ["3", "1.5e-3", "nan", "-inf", "61.5"]
