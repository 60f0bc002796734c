"""The CUDA kernels, compiled for a host that emulates their execution, as ops of CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gpkernels import ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TORCH = Path(torch.__file__).parent
NAMESPACE = "gpkernels_emulated"
RUNTIME = ROOT / "tests" / "emulation" / "emulation.cpp"
_SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Of kernels, of the runtime, and of the linker. The runtime hides from the race detector; where bytes are counted it
# stands in for the detector's library.
FLAGS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ([], [], []),
    "sanitized": (_SANITIZERS, _SANITIZERS, _SANITIZERS),
    "raced": (["-g1", "-fsanitize=thread"], ["-DGPK_EMULATION_RACES"], ["-fsanitize=thread"]),
    "counted": (["-fsanitize=thread"], ["-DGPK_EMULATION_TRAFFIC"], []),
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def unchanged(name: str, text: str) -> str:
    """Return a source unchanged."""
    return text


def build(flavour: str = "plain", patch: Callable[[str, str], str] = unchanged, only: str = "") -> Path:
    """Build a shared library of every kernel, or those of one source, if a source has changed.

    ``patch`` may change a source, given its name and text, for tests that must detect a bug.
    """
    sources = [path for path in SOURCES if only in ("", path.stem)]
    headers = [
        *(ROOT / "csrc").glob("*.h"),
        *(ROOT / "csrc" / "cuda").glob("*.h"),
        *(ROOT / "tests/emulation").glob("*.h"),
    ]
    texts = {str(path.relative_to(ROOT)): patch(path.name, path.read_text()) for path in [*SOURCES, RUNTIME, *headers]}
    key = hashlib.sha256(repr((torch.__version__, FLAGS[flavour], only, sorted(texts.items()))).encode()).hexdigest()[
        :16
    ]
    folder = ROOT / "build" / "emulated" / f"{flavour}-{key}"
    library = folder / "emulated.so"
    with alone(folder):
        if not library.exists():
            _compile(library, texts, sources, flavour)
    return library


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder, as several may run tests."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(library: Path, texts: dict[str, str], sources: list[Path], flavour: str) -> None:
    folder = library.parent
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    flags = ["-std=c++20", "-O1", "-fPIC", "-DGPK_HOST_EMULATION", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    for_kernels, for_runtime, for_linker = FLAGS[flavour]
    includes = ["-isystem", str(TORCH / "include"), "-I", str(folder / "tests" / "emulation")]

    def compile_together(sources: list[Path]) -> Path:
        made = folder / f"{sources[0].stem}.o"
        text = made.with_suffix(".cpp")
        text.write_text("".join(f'#include "{source.relative_to(ROOT)}"\n' for source in sources))
        own = for_runtime if RUNTIME in sources else for_kernels
        run([str(compiler()), *flags, *own, *includes, "-c", str(text), "-o", str(made)])
        return made

    # PyTorch's headers take longer than the kernels: a compiler reads them once for half of the sources.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_together, filter(None, [sources[::2], sources[1::2], [RUNTIME]])))
    linked = library.with_suffix(".linked")
    link = [str(compiler()), "-shared", *for_linker, "-o", str(linked), *map(str, objects)]
    run([*link, f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"])
    linked.rename(library)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


COMPOSED = "scaled_dot_product_attention"  # the stem of ops without CUDA kernels, made of PyTorch's calls
_library = torch.library.Library(NAMESPACE, "DEF")


@cache
def kernels(library: Path) -> dict[str, Any]:
    """The emulated kernels by raw op name; the reference of an op that has none."""
    defined = {name: op.define_in(_library) for name, op in ops.ALL.items()}
    torch.ops.load_library(str(library))
    composed = {name: ops.ALL[name].implementation for name in defined if name.startswith(COMPOSED)}
    return defined | composed


def launches(library: Path) -> int:
    """How many kernels this process has launched."""
    return int(ctypes.CDLL(str(library)).emulated_launches())


def memory_sets(library: Path) -> int:
    """How many times this process has set memory on the device, which tickets need where blocks share a sum."""
    return int(ctypes.CDLL(str(library)).emulated_memory_sets())


def traffic(library: Path) -> tuple[int, int]:
    """Bytes that kernels of a "counted" library have read and written in global memory, in this process."""
    count = ctypes.CDLL(str(library)).emulated_bytes
    count.restype = ctypes.c_uint64
    return int(count(0)), int(count(1))
