"""Compilation of the CUDA kernels for each architecture, and the resources that they need."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emulated import ROOT, SOURCES, TORCH, alone

TABLE = ROOT / "gpkernels" / "cuda_kernels.csv"
ARCHITECTURES = (80, 90, 100, 120)
COLUMNS = ("kernel", "target", "variants", "registers", "spilled_bytes", "shared_bytes")
OBJECTS = ROOT / "build" / "compiled"
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<target>\S+)'.*?(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def command(*options: str) -> list[str]:
    """The compiler with the options that all kernels have, and further ones."""
    return [str(nvcc()), "-std=c++20", "-O3", "-DUSE_CUDA", "-isystem", str(TORCH / "include"), *options]


def release() -> str:
    """nvcc's release: another one's kernels need other registers."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


class Part(NamedTuple):
    """Sources that a compiler reads together, and the architectures that it compiles them for."""

    sources: tuple[Path, ...]
    architectures: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join([self.sources[0].stem, *(f"sm_{a}" for a in self.architectures)])

    @property
    def object(self) -> Path:
        """The file that the kernels are in."""
        return OBJECTS / f"{self}.o"

    def resources(self) -> list[dict[str, Any]]:
        """A row for each variant of each kernel and architecture; the object stays, and is made anew after a change."""
        texts = [
            path.read_text() for path in sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir()])
        ]
        key = hashlib.sha256(repr((torch.__version__, release(), self, texts)).encode()).hexdigest()
        known = self.object.with_suffix(".json")
        with alone(OBJECTS / str(self)):
            if known.exists():
                there, rows = json.loads(known.read_text())
                if there == key:
                    return rows
            known.unlink(missing_ok=True)
            rows = self._compile()
            known.write_text(json.dumps([key, rows]))
            return rows

    def _compile(self) -> list[dict[str, Any]]:
        together = self.object.with_suffix(".cu")
        together.write_text("".join(f'#include "{source}"\n' for source in self.sources))
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        done = subprocess.run(
            command(*targets, "-Xptxas", "-v", "-Xcompiler=-fPIC", "-c", str(together), "-o", str(self.object)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return [_row(match) for match in _ENTRY.finditer(done.stderr)]


# PyTorch's headers take longer than the kernels: a compiler reads them once for half of the sources. Architectures
# share only its pass for the host, so that two at a time cost little more than all four, and end sooner.
PARTS = [
    Part(tuple(SOURCES[first::2]), architectures)
    for first in (0, 1)
    for architectures in (ARCHITECTURES[:2], ARCHITECTURES[2:])
]


def objects(architecture: int) -> list[Path]:
    """Compile all kernels for an architecture and some other; return the objects that they are in."""
    parts = [part for part in PARTS if architecture in part.architectures]
    for part in parts:
        part.resources()
    return [part.object for part in parts]


def _row(match: re.Match[str]) -> dict[str, Any]:
    kernel = re.search(r"(?<=\d)([a-z]+(?:_[a-z]+)*_kernel|reduce_[a-z]+_rows)(?=I)", match["name"])
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    own = re.search(r"(?<=\d)([A-Z][a-z]+Of[A-Z][a-z]+)(?=I)", match["name"]) or kernel  # what sums over rows are of
    stem = next((s.stem for s in SOURCES if own and re.search(rf"\b{own[1]}\b", s.read_text())), "unknown")
    return {
        "kernel": f"{stem}: {kernel[1] if kernel else match['name']}",
        "target": match["target"],
        "variants": 1,
        "registers": int(match["registers"]),
        "spilled_bytes": int(match["spilled"]),
        "shared_bytes": int(shared[1]) if shared else 0,
    }


@cache
def resources() -> list[dict[str, Any]]:
    """A row for each kernel and architecture: how many variants, and the most that one of them needs."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [row for rows in pool.map(Part.resources, PARTS) for row in rows]
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found:
        known = table.setdefault((row["kernel"], row["target"]), {**row, "variants": 0})
        known["variants"] += 1
        for column in COLUMNS[3:]:
            known[column] = max(known[column], row[column])
    return [table[key] for key in sorted(table)]


def tracked() -> dict[tuple[str, str], dict[str, int]]:
    """The table as it was last written."""
    with TABLE.open(newline="") as file:
        return {
            (row["kernel"], row["target"]): {column: int(row[column]) for column in COLUMNS[2:]}
            for row in csv.DictReader(file)
        }


def main() -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(resources())


if __name__ == "__main__":
    sys.exit(main())
