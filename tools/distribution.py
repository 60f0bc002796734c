"""Build what is uploaded: a wheel with kernels for this Python, one without for all others, the source distribution.

The source distribution is made in an environment without PyTorch, and the wheels from what it holds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Libraries of PyTorch, which is loaded before the modules; a wheel must not bring its own.
TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so")
PLATFORM = "manylinux_2_28_x86_64"  # of PyTorch's wheels; csrc/older_libraries.cpp


def run(*command: str | Path, **environment: str) -> None:
    """Run one of this Python's modules; exit with its code if it fails."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    own = {**os.environ, "PATH": path, **environment}
    code = subprocess.run([sys.executable, "-m", *map(str, command)], env=own, check=False).returncode
    if code:
        sys.exit(code)


def build(out: Path) -> list[Path]:
    """Build into an empty folder and return the files."""
    shutil.rmtree(out, ignore_errors=True)
    run("build", "--sdist", "--outdir", out, ROOT)
    (source,) = out.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        tree = folder / source.name.removesuffix(".tar.gz")
        run("build", "--wheel", "--no-isolation", "--outdir", folder, tree, GPKERNELS_BUILD="cpu")
        (wheel,) = folder.glob("*.whl")
        excluded = [word for library in TORCH for word in ("--exclude", library)]
        run("auditwheel", "repair", *excluded, "--plat", PLATFORM, "--only-plat", "--wheel-dir", out, wheel)
        shutil.rmtree(tree / "build")  # it has the kernels
        run("build", "--wheel", "--no-isolation", "--outdir", out, tree, GPKERNELS_BUILD="none")
    return sorted(out.iterdir())


def main() -> None:
    """Build, and list the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="emptied first (default: dist)")
    files = build(parser.parse_args().out.resolve())
    print("\nTo upload, after the same on every Python that is to have kernels:")
    for file in files:
        print(f"  {file}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
