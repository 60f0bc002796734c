"""Building and installing: errors of setup.py, and contents of the wheels and the source distribution."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from gpkernels import backends
from gpkernels.version import OLDEST_TORCH, __version__
from installed import ROOT, SITE, copy_tree, output, run

PACKAGES = ("gpkernels/__init__.py", "gpkernels/py.typed", "gptrainer/__init__.py", "gptrainer/py.typed")


def _setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("setup.py", *(arguments or ("--version",)), path=SITE, cwd=ROOT, **environment)


def _wheel(tree: Path, **environment: str) -> Path:
    """The wheel that pip builds from a tree, offline."""
    wheels = tree / "wheels"
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--wheel-dir")
    done = run("-m", "pip", "wheel", *options, str(wheels), str(tree), path=SITE, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("nonsense", "GPKERNELS_BUILD: expected auto, cpu, cuda or none, got 'nonsense'"), ("cuda", "needs nvcc")],
)
def test_a_build_that_cannot_be_had_ends_with_a_clear_message(wanted: str, said: str) -> None:
    done = _setup(GPKERNELS_BUILD=wanted, CUDACXX="no-such-nvcc", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_build_environment_without_torch_names_the_cure(tmp_path: Path) -> None:
    """As under build isolation, where only setuptools is there."""
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (Path(SITE) / name).exists():
            (tmp_path / name).symlink_to(Path(SITE) / name)
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['setup.py', '--version']\n"
    command = [sys.executable, "-I", "-S", "-c", code + "runpy.run_path('setup.py', run_name='__main__')"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
    assert "torch" in done.stderr
    assert "GPKERNELS_BUILD=none" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def _torch(folder: Path, version: str) -> str:
    """A folder with the metadata of a PyTorch, for PYTHONPATH."""
    about = folder / f"torch-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return str(folder)


@pytest.mark.parametrize("wanted", ["auto", "none"])
def test_a_build_beside_an_older_torch_stops_before_pip_replaces_it(wanted: str, tmp_path: Path) -> None:
    """`dist_info` is the first command of a build, before pip resolves the package's dependencies."""
    older = _torch(tmp_path, "2.9.1+cpu")
    done = run("setup.py", "dist_info", path=older, cwd=copy_tree(tmp_path / "tree"), GPKERNELS_BUILD=wanted)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpkernels: expected torch {OLDEST_TORCH} or later, got 2.9.1+cpu")


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    assert f'dependencies = ["torch>={OLDEST_TORCH}"]' in (ROOT / "pyproject.toml").read_text()
    if backends.extension is not None:
        assert backends.extension.build_info()["oldest_torch"] == OLDEST_TORCH


def test_requirements_agree_with_the_extras() -> None:
    def names(text: str) -> set[str]:
        return {name.lower() for name in re.findall(r"^([\w-]+)==", text, re.M)}

    extras = dict(re.findall(r"^(train|tensorboard|bench) = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M))
    training, development = ((ROOT / f"requirements{more}.txt").read_text() for more in ("", "-dev"))
    assert {name.lower() for name in json.loads(extras["train"])} <= names(training)
    assert "tensorboard" in names(development)
    assert not names(training) & names(development)
    assert not names(training) & {"tensorboard", "triton", "mypy", "ruff", "pytest"}
    assert development.startswith("# What `make install` adds for development.\n-r requirements.txt\n")


def test_without_a_compiler_auto_builds_without_kernels_and_cpu_says_what_is_missing() -> None:
    for wanted, fails in (("auto", False), ("cpu", True)):
        done = _setup(GPKERNELS_BUILD=wanted, PATH="/nonexistent", CXX="no-such-compiler")
        assert (done.returncode != 0) == fails
        assert "a C++ compiler" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_source_distribution_holds_what_a_build_reads(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    done = run("setup.py", "-q", "sdist", path=SITE, cwd=tree, PATH="/nonexistent")  # needs no tool
    assert done.returncode == 0, done.stderr
    (made,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert native <= names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= names
    assert {"Makefile", "CONTRIBUTING.md", "requirements.txt", "requirements-dev.txt"} <= names
    tests = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py")}
    assert {"docs/architecture.md", "bench/parts.py", "examples/wgan_gp.py", "tools/distribution.py", *tests} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_a_wheel_without_kernels_is_pure_and_works(tmp_path: Path) -> None:
    wheel = _wheel(copy_tree(tmp_path), GPKERNELS_BUILD="none")
    assert wheel.name == f"gpkernels-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    assert set(PACKAGES) <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    code = "import torch, gpkernels as gpk; from gpkernels import backends; x = torch.ones(2)\n"
    printed = output(
        code + "gpk.clip_weights_(x, 0.1); print(gpk.__file__, backends.running('cpu'))", tmp_path / "unpacked"
    )
    assert printed.split() == [str(tmp_path / "unpacked/gpkernels/__init__.py"), "reference"]


@pytest.mark.slow
def test_a_wheel_has_kernels_and_works_from_anywhere(tmp_path: Path) -> None:
    """The whole native build from a copy of the tree."""
    wheel = _wheel(copy_tree(tmp_path), GPKERNELS_BUILD="cpu")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    roots = {name.split("/")[0] for name in names}
    assert roots == {"gpkernels", "gptrainer", f"gpkernels-{__version__}.dist-info"}
    sources = {f"gpkernels/{p.relative_to(ROOT / 'gpkernels')}" for p in (ROOT / "gpkernels").rglob("*.py")}
    assert {*PACKAGES, *sources} <= set(names)
    for module in ("_C", "_direct"):
        assert len([name for name in names if name.startswith(f"gpkernels/{module}.")]) == 1
    code = (
        "import json, torch, gpkernels as gpk; from gpkernels import info\n"
        "gpk.set_backend('cpu'); x = torch.randn(3, 5, requires_grad=True); gpk.gradient_norm_penalty(x).backward()\n"
        "import gptrainer; print(json.dumps([gpk.__file__, gptrainer.__file__, info.facts()]))"
    )
    ours, trainer, facts = json.loads(output(code, tmp_path / "unpacked"))
    assert ours.startswith(str(tmp_path / "unpacked"))
    assert trainer.startswith(str(tmp_path / "unpacked"))
    assert facts["running"]["cpu"] == "cpu"
    assert facts["build"]["torch"] == torch.__version__
    assert facts["fast_paths"] == "loaded"
    assert "-march=native" not in facts["build"]["flags"]
    scripts = (tmp_path / f"unpacked/gpkernels-{__version__}.dist-info/entry_points.txt").read_text()
    assert "gpkernels = gpkernels.cli:main" in scripts
