"""Run CMake with Ninja; CMakeLists.txt describes the build and pyproject.toml the package.

GPKERNELS_BUILD selects what is built: "auto" (whatever this machine supports), "cpu", "cuda" or "none".
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("GPKERNELS_BUILD", "auto")
FAST_PATHS = {"_direct": "small ops", "_program": "the steps of small critics"}
NEEDS = ("pybind11", "cmake", "ninja")
UNBUILT = {"sdist", "egg_info"}  # commands that build nothing


def check_torch() -> None:
    """Exit with an error unless there is a PyTorch that the package runs on, before pip exchanges it for another."""
    text = (Path(__file__).resolve().parent / "gpkernels" / "version.py").read_text(encoding="utf-8")
    oldest = re.findall(r'OLDEST_TORCH = "([\d.]+)"', text)[0]
    try:
        found = version("torch")
    except PackageNotFoundError:
        if WANTED == "none":
            return
        sys.exit(
            "gpkernels: no torch in this build environment, which pip isolates unless told otherwise; with torch "
            f"{oldest} or later installed: pip install pybind11 cmake ninja setuptools wheel && pip install "
            "--no-build-isolation .   or, without native kernels: GPKERNELS_BUILD=none pip install ."
        )
    if [int(n) for n in found.split(".")[:2]] < [int(n) for n in oldest.split(".")]:
        sys.exit(f"gpkernels: expected torch {oldest} or later, got {found}, which was left as it is; upgrade it first")


def compiler() -> str | None:
    """Return the C++ compiler that CMake will use."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def nvcc() -> str | None:
    """Return the CUDA compiler that CMake will use."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(f"{home}/bin/nvcc")


def wants_extension() -> bool:
    """Whether to build the extension; exits with an error where it was requested and cannot be built."""
    if WANTED not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"GPKERNELS_BUILD: expected auto, cpu, cuda or none, got {WANTED!r}")
    if WANTED == "cuda" and nvcc() is None:
        sys.exit("GPKERNELS_BUILD=cuda: the build needs nvcc, the CUDA compiler; set CUDACXX if it is not on PATH")
    if UNBUILT & set(sys.argv):
        return False
    check_torch()
    if WANTED == "none":
        return False
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None and shutil.which(name) is None]
    if missing or compiler() is None:
        lack = [*missing, *([] if compiler() else ["a C++ compiler"])]
        if WANTED in ("cpu", "cuda"):
            sys.exit(f"GPKERNELS_BUILD={WANTED}: the build needs {', '.join(lack)}")
        print(f"gpkernels: building without native kernels; missing: {', '.join(lack)}", file=sys.stderr)
        return False
    return True


class CMakeBuild(build_ext):
    """Configure, build, and copy the modules to where setuptools expects them."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        source = Path(__file__).resolve().parent
        # Tools installed by pip are in this Python's directory, which may not be on PATH.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        cmake = shutil.which("cmake", path=path) or "cmake"
        environment = {**os.environ, "PATH": path}
        configure = [cmake, "-S", str(source), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        if WANTED == "cuda":
            configure += ["-DGPK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build)], check=True, env=environment)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        made = [target.name, *(["_cuda.so"] if WANTED == "cuda" else [])]
        short = {name: target.name.replace("_C", name, 1) for name in FAST_PATHS}
        for name, file in short.items():  # optional: they depend on internals of one PyTorch release
            done = subprocess.run([cmake, "--build", str(build), "--target", name], env=environment)
            if done.returncode == 0 and (build / file).exists():
                made.append(file)
            else:
                print(f"gpkernels: building without {name}: {FAST_PATHS[name]} are slower", file=sys.stderr)
        # setuptools knows one module; it would not copy the others into an editable package.
        for folder in (target.parent, *([source / "gpkernels"] if self.editable_mode else [])):
            folder.mkdir(parents=True, exist_ok=True)
            for name in {*made, *short.values()}:
                (folder / name).unlink(missing_ok=True)  # a running process may have mapped an older one
            for name in made:
                shutil.copy2(build / name, folder / name)


setup(
    ext_modules=[Extension("gpkernels._C", sources=[])] if wants_extension() else [],
    cmdclass={"build_ext": CMakeBuild},
)
