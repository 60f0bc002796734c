"""The CUDA kernels, compiled for a host that emulates their execution, as ops of CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gpkernels import ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TORCH = Path(torch.__file__).parent
NAMESPACE = "gpkernels_emulated"
COUNTER = ROOT / "tests" / "emulation" / "launches.cpp"
FLAGS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def build(flavour: str = "plain", patch: Callable[[str, str], str] = lambda name, text: text, only: str = "") -> Path:
    """A shared library with every kernel, or those of one source, built again only when a source has changed.

    ``patch`` may change a source by its name and text, for tests that must see a bug found.
    """
    sources = [path for path in SOURCES if only in ("", path.stem)]
    headers = [
        *(ROOT / "csrc").glob("*.h"),
        *(ROOT / "csrc" / "cuda").glob("*.h"),
        *(ROOT / "tests/emulation").glob("*.h"),
    ]
    texts = {str(path.relative_to(ROOT)): patch(path.name, path.read_text()) for path in [*SOURCES, COUNTER, *headers]}
    key = hashlib.sha256(repr((torch.__version__, FLAGS[flavour], only, sorted(texts.items()))).encode()).hexdigest()[
        :16
    ]
    folder = ROOT / "build" / "emulated" / f"{flavour}-{key}"
    library = folder / "emulated.so"
    if library.exists():
        return library
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    flags = ["-std=c++20", "-fPIC", "-DGPK_HOST_EMULATION", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *FLAGS[flavour]]
    includes = ["-isystem", str(TORCH / "include"), "-I", str(folder / "tests" / "emulation")]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        text = folder / source.relative_to(ROOT)
        run([str(compiler()), *flags, *includes, "-x", "c++", "-c", str(text), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources, COUNTER]))
    link = [str(compiler()), "-shared", *FLAGS[flavour], "-o", str(library), *map(str, objects)]
    run([*link, f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"])
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


_library = torch.library.Library(NAMESPACE, "DEF")


@cache
def kernels(library: Path) -> dict[str, Any]:
    """The emulated kernels by raw op name."""
    defined = {name: op.define_in(_library) for name, op in ops.ALL.items() if name != "mlp_critic_step"}
    torch.ops.load_library(str(library))
    return defined


def launches(library: Path) -> int:
    """How many kernels this process has launched."""
    return int(ctypes.CDLL(str(library)).emulated_launches())
