"""What ``make dist`` makes, installed as a user would: minutes, so only ``make test-dist`` runs this."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from gpkernels.version import OLDEST_TORCH, __version__
from installed import ROOT, SITE

pytestmark = pytest.mark.slow
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is uploaded."""
    out = tmp_path_factory.mktemp("uploads") / "dist"
    done = subprocess.run(
        [sys.executable, ROOT / "tools/distribution.py", "--out", out], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in out.iterdir():
        assert str(file) in done.stdout
    return out


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def fresh(folder: Path, wheel: Path, site: str = SITE) -> Path:
    """A venv that finds another's packages, PyTorch among them, and has the wheel; pip may fetch nothing."""
    venv.create(folder, with_pip=True)
    packages = one(folder / "lib", "python3*") / "site-packages"
    (packages / "shared.pth").write_text(site + "\n")
    command = [folder / "bin/python", "-m", "pip", "install", "--no-index", "--ignore-installed", "--no-deps", wheel]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bin"


def told(bin_folder: Path, *command: str) -> str:
    """What a command prints where there is no compiler; it must succeed."""
    own = {"PATH": str(bin_folder), "HOME": str(bin_folder.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([bin_folder / command[0], *command[1:]], env=own, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_verifies_itself_where_there_is_no_compiler(dist: Path, tmp_path: Path) -> None:
    installed = fresh(tmp_path / "venv", one(dist, f"*-{TAG}-{TAG}-manylinux*.whl"))
    page = told(installed, "gpkernels", "info")
    assert "cpu        available" in page
    assert f"loaded, for torch {torch.__version__.partition('+')[0]} only" in page
    assert "none failed" in told(installed, "gpkernels", "verify", "--quick", "--backend", "cpu")


@pytest.mark.skipif("GPK_OTHER_TORCH" not in os.environ, reason="make test-dist TORCH=VERSION")
def test_the_same_wheel_verifies_itself_with_another_torch(dist: Path, tmp_path: Path) -> None:
    site = os.environ["GPK_OTHER_TORCH"]
    (other,) = metadata.distributions(name="torch", path=[site])
    assert other.version.partition("+")[0] != torch.__version__.partition("+")[0]
    installed = fresh(tmp_path / "venv", one(dist, f"*-{TAG}-{TAG}-manylinux*.whl"), site)
    page = told(installed, "gpkernels", "info")
    assert f"torch {other.version.partition('+')[0]}" in page
    assert "cpu        available" in page
    assert "none failed" in told(installed, "gpkernels", "verify", "--quick", "--backend", "cpu")


def test_the_wheel_installs_wherever_pytorchs_does(dist: Path) -> None:
    (pytorch,) = metadata.distributions(name="torch", path=[SITE])
    (platform,) = re.findall(r"^Tag: .*-(\S+)$", pytorch.read_text("WHEEL") or "", re.M)
    assert one(dist, f"*-{TAG}-{TAG}-*.whl").stem.endswith(f"-{platform}")


def test_the_wheel_leaves_an_installed_torch_alone(dist: Path) -> None:
    with zipfile.ZipFile(one(dist, "*manylinux*.whl")) as archive:
        about = archive.read(f"gpkernels-{__version__}.dist-info/METADATA").decode()
    wanted = [line for line in about.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert wanted == [f"Requires-Dist: torch>={OLDEST_TORCH}"]


def test_the_wheel_holds_no_library_of_pytorchs(dist: Path) -> None:
    with zipfile.ZipFile(one(dist, "*manylinux*.whl")) as archive:
        libraries = {Path(name).name.partition(".")[0] for name in archive.namelist() if ".so" in name}
    assert libraries == {"_C", "_direct", "_program"}


def test_the_wheel_for_other_platforms_runs_on_the_reference(dist: Path, tmp_path: Path) -> None:
    installed = fresh(tmp_path / "venv", one(dist, f"gpkernels-{__version__}-py3-none-any.whl"))
    assert "cpu tensors run on reference" in told(installed, "gpkernels", "info")


def test_the_source_distribution_tests_itself(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(one(dist, "*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / f"gpkernels-{__version__}"
    for name in ("docs/architecture.md", "bench/results", "examples/wgan_gp.py", "CONTRIBUTING.md", "Makefile"):
        assert (tree / name).exists()
    with zipfile.ZipFile(one(dist, "*manylinux*.whl")) as archive:  # as an editable install of the tree would make them
        archive.extractall(tree, [name for name in archive.namelist() if name.endswith(".so")])
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "python", tree / "tests")))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    every = subprocess.run([*command, "--collect-only", "-q"], cwd=tree, env=own, capture_output=True, text=True)
    assert every.returncode == 0, every.stdout + every.stderr
    some = ("tests/test_docs.py", "tests/test_imports.py", "tests/test_penalties.py", "tests/test_examples.py")
    done = subprocess.run([*command, *some], cwd=tree, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
