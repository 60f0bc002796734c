"""Separate Pythons for the tests of importing and installing, which see the package at a path and not the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *("gpkernels", "python", "csrc", "tests", "docs", "bench", "examples", "tools"),
    *("CMakeLists.txt", "MANIFEST.in", "setup.py", "pyproject.toml", "Makefile"),
    *("requirements.txt", "requirements-dev.txt"),
)
SITE = sysconfig.get_paths()["purelib"]


def run(
    *arguments: str, path: Path | str = ROOT, cwd: Path | str = "/", **environment: str
) -> subprocess.CompletedProcess[str]:
    """This Python with ``path`` and the installed packages but no .pth file: those lead back to the checkout."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("GPKERNELS_", "PYTHON"))}
    own |= {"PYTHONPATH": os.pathsep.join((str(path), SITE)), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-S", *arguments], env=own, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


def output(code: str, path: Path | str = ROOT, **environment: str) -> str:
    """What a snippet prints; it must succeed."""
    done = run("-c", code, path=path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_package(to: Path) -> Path:
    """gpkernels without its extensions, in a folder of its own."""
    shutil.copytree(ROOT / "gpkernels", to / "gpkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def copy_tree(to: Path) -> Path:
    """What a source distribution holds, without what a build leaves."""
    to.mkdir(exist_ok=True)
    for name in (*SOURCES, "LICENSE", *(path.name for path in ROOT.glob("*.md"))):
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            shutil.copytree(source, to / name, ignore=ignore)
        elif source.is_file():
            shutil.copy2(source, to / name)
    return to
