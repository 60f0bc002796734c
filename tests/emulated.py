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
EMULATION = RUNTIME.with_suffix(".h")
BUILT = ROOT / "build" / "emulated"
_SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
_DETECTOR = ["-g1", "-fsanitize=thread"]
# Of kernels, of the runtime, and of the linker. The runtime hides from the race detector; where bytes are counted it
# stands in for the detector's library.
FLAGS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ([], [], []),
    "sanitized": ([*_SANITIZERS, "-O0"], _SANITIZERS, _SANITIZERS),  # as it compiles in half the time
    "raced": (_DETECTOR, ["-g1", "-DGPK_EMULATION_RACES"], ["-fsanitize=thread"]),
    "counted": (_DETECTOR, ["-DGPK_EMULATION_TRAFFIC"], []),
}
COMMON = ["-std=c++20", "-O1", "-fPIC", "-DGPK_HOST_EMULATION", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def unchanged(name: str, text: str) -> str:
    """Return a source unchanged."""
    return text


def build(flavour: str = "plain", patch: Callable[[str, str], str] = unchanged, only: str = "") -> Path:
    """Build a shared library of every kernel, or those of one source, if a source has changed.

    ``patch`` may change a source, given its name and text, for tests that must detect a bug.
    """
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    sources = [path for path in SOURCES if only in ("", path.stem)]
    for_kernels, for_runtime, for_linker = FLAGS[flavour]
    units = [
        *(
            _Unit(half, [*half, *headers, EMULATION], for_kernels, patch)
            for half in (sources[::2], sources[1::2])
            if half
        ),
        _Unit([RUNTIME], [RUNTIME, EMULATION], for_runtime, patch),
    ]
    folder = BUILT / f"{flavour}-{_key(for_linker, [unit.key for unit in units])}"
    library = folder / "emulated.so"
    with alone(folder):
        if not library.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(_Unit.compile, units))
            linked = library.with_suffix(".linked")
            link = [str(compiler()), "-shared", *for_linker, "-o", str(linked), *map(str, objects)]
            run([*link, f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"])
            linked.rename(library)
    return library


def _key(*what: Any) -> str:
    return hashlib.sha256(repr((torch.__version__, what)).encode()).hexdigest()[:16]


class _Unit:
    """Sources that the compiler reads together, as it reads their headers once; flavours share what is the same."""

    def __init__(
        self, sources: list[Path], reads: list[Path], own: list[str], patch: Callable[[str, str], str]
    ) -> None:
        self.text = "".join(f'#include "{source.relative_to(ROOT)}"\n' for source in sources)
        self.reads = {str(path.relative_to(ROOT)): patch(path.name, path.read_text()) for path in reads}
        self.flags = [*COMMON, *own]
        self.key = _key(self.text, self.flags, sorted(self.reads.items()))

    def compile(self) -> Path:
        folder = BUILT / self.key
        made = folder / "unit.o"
        with alone(folder):
            if not made.exists():
                for name, text in {**self.reads, "unit.cpp": self.text}.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_text(text)
                includes = ["-isystem", str(TORCH / "include"), "-I", str(folder / "tests" / "emulation")]
                part = made.with_suffix(".part")
                run([str(compiler()), *self.flags, *includes, "-c", str(folder / "unit.cpp"), "-o", str(part)])
                part.rename(made)
        return made


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder, as several may run tests."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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


@contextmanager
def logged(library: Path, path: Path) -> Iterator[None]:
    """Write a line to a file for each launch: where the kernel is in the library, grid, block, bytes of arguments."""
    log = ctypes.CDLL(str(library)).emulated_log
    log(str(path).encode())
    try:
        yield
    finally:
        log(None)


def traffic(library: Path) -> tuple[int, int]:
    """Bytes that kernels of a "counted" library have read and written in global memory, in this process."""
    count = ctypes.CDLL(str(library)).emulated_bytes
    count.restype = ctypes.c_uint64
    return int(count(0)), int(count(1))
