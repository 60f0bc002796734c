"""Proofs that launches of the CUDA kernels are free of races and deadlocks, by a static verifier of PTX.

Emulated kernels say what the ops launch: kernel, grid, block and arguments. For each launch the verifier, sentryward,
follows all threads of the kernel's PTX and proves for every schedule that barriers are reached by all, and that no two
threads access the same memory unordered. It cannot follow branches on values in memory.
"""

from __future__ import annotations

import csv
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import compiled
import emulated
from shared import once

TABLE = Path(__file__).with_name("cuda_races.csv")
COLUMNS = ("op", "kernel", "grid", "block", "verdict")
PROVED = "race_free"
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_POINTERS = range(1 << 40, 1 << 47)  # addresses of a 64-bit process, and no size of a tensor


@dataclass(frozen=True)
class Launch:
    """A launch that an op makes. kernel: its name with template arguments; arguments: their bytes."""

    op: str
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[bytes, ...]

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.kernel, "x".join(map(str, self.grid)), "x".join(map(str, self.block))


def is_there() -> bool:
    return find_spec("sentryward") is not None and compiled.nvcc() is not None and emulated.compiler() is not None


def arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each op with kernels: rows that a warp has, and images that take several blocks."""
    torch.manual_seed(0)
    x, y, c3, none = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3), torch.empty(3, 0)
    image, other, c8, nothing = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32), torch.rand(8), torch.empty(8, 0)
    key, one, scale = torch.tensor([5]), torch.tensor(0.7), torch.rand(1)
    weights = [torch.randn(4, 3), torch.randn(7)]
    state = [torch.rand_like(w) for w in weights]
    curved = torch.randn(1, 2, 40), torch.rand(1, 2, 1), torch.randn(1, 2, 40), torch.randn(1, 2, 40)
    return {
        "interpolate": [(x, y, c3), (image, other, c8)],
        "interpolate_backward": [(x, c3, True, True), (x, c3, True, False), (image, c8, True, True)],
        "instance_noise": [(x, 0.5, None, key, True), (x, 0.5, scale, key, False), (image, 0.5, scale, key, False)],
        "gradient_norm_penalty": [
            (x, 1.0, False, 1, 2.0),
            (x.half(), 1.0, False, 0, 2.0),
            (x, 1.0, True, 0, 1.5),
            (torch.randn(300, 2), 0.0, False, 1, 2.0),
            (image, 1.0, False, 1, 2.0),
        ],
        "gradient_norm_penalty_backward": [(one, x, c3), (c8, image, c8)],
        "consistency_term": [(x, y, none, none, 0.1, 0.1), (x, y, y, x, 0.1, 0.1)],
        "lipschitz_consistency": [(c3, c3 + 1, x, y, 0.1)],
        "consistency_backward": [
            (one, x, y, none, none, c3, c3, False),
            (one, image, other, nothing, nothing, c8, c8, False),
        ],
        "score_loss": [([x, c3], [1, 0], [0.0, 0.0])],
        "score_loss_backward": [(one, [x, c3], [1, 3], [0.0, 0.0]), (one, [image], [2], [0.3])],
        "relativistic_loss": [(x, y)],
        "relativistic_loss_backward": [(one, x, y), (one, image, other)],
        "normalise_curvature": [(*curved, True)],
        "affine_gradients": [(torch.randn(70, 300, 1), torch.randn(70, 300, 1))],
        "mean_pool": [(image, 2, 2), (x[None, None].half(), 1, 5)],
        "mean_pool_backward": [(torch.randn(2, 3, 3, 4), 2, 2), (torch.randn(5, 2, 3).bfloat16(), 3, 1)],
        "clip_weights_": [(weights, 0.1)],
        "rmsprop_": [(weights, state, [w.clone() for w in state], [], [], 1e-2, 0.9, 1e-8, 0.1, 0.0, False, 0.05)],
    }


@cache
def launches() -> list[Launch]:
    """Launches of all ops, each kernel, grid and block once."""
    library = emulated.build()
    kernels, found = emulated.kernels(library), dict[tuple[str, ...], Launch]()
    nm = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    names = {int(line[0], 16): line[2] for line in map(str.split, nm.splitlines()) if len(line) == 3}
    with tempfile.TemporaryDirectory() as folder:
        for op, calls in arguments().items():
            log = Path(folder) / op
            with emulated.logged(library, log):
                for call in calls:
                    kernels[op](*call)
            for line in log.read_text().splitlines():
                at, grid, block, *given = line.split()
                sizes = [tuple(map(int, d.split(","))) for d in (grid, block)]
                (name,) = _without_parameters([names[int(at, 16)]])
                launch = Launch(op, name, sizes[0], sizes[1], tuple(map(bytes.fromhex, given)))
                found.setdefault(launch.key, launch)
    return list(found.values())


def _without_parameters(symbols: list[str]) -> list[str]:
    """Return the names of functions, by which symbols of two compilers can be compared."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    plain = (re.sub(r"gpk::cuda::|\(anonymous namespace\)::|^void ", "", name) for name in done.stdout.splitlines())
    return [re.sub(r"\(bool\)1", "true", re.sub(r"\(bool\)0", "false", name)).split("(")[0] for name in plain]


# --- PTX --------------------------------------------------------------------------------------------------------------


def ptx(only: str = "", patch: Callable[[str, str], str] = emulated.unchanged) -> str:
    """Compile kernels to PTX, of one source or of all; ``patch`` as in ``emulated.build``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in [*(emulated.ROOT / "csrc").glob("*.h"), *(emulated.ROOT / "csrc" / "cuda").iterdir()]:
            copy = folder / path.relative_to(emulated.ROOT / "csrc")
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(patch(path.name, path.read_text()))
        sources = [s for s in compiled.SOURCES if only in ("", s.stem)]
        (folder / "all.cu").write_text("".join(f'#include "cuda/{source.name}"\n' for source in sources))
        emulated.run(compiled.command("-arch=sm_90", "-ptx", str(folder / "all.cu"), "-o", str(folder / "all.ptx")))
        return (folder / "all.ptx").read_text()


class Module:
    """PTX of several kernels, of which the verifier reads one at a time."""

    def __init__(self, text: str) -> None:
        self._text = text
        entries = re.findall(r"\.entry (\S+?)\(", text)
        self.entries = dict(zip(_without_parameters(entries), entries, strict=True))
        self._head = re.sub(r"(\.visible |\.weak )?\Z", "", text[: text.index(".entry")])

    def of(self, entry: str) -> str:
        """Return the PTX of one kernel, with the functions that it calls."""
        found = re.search(rf"\.entry {re.escape(entry)}\(.*?\n}}\n", self._text, re.S)
        assert found is not None
        functions = re.findall(r"^(\.func [^;{]*?(\w+)\([^)]*\)\n\{.*?\n\}\n)", self._text, re.M | re.S)
        return self._head + found[0] + "".join(body for body, name in functions if name in found[0])


def configuration(launch: Launch, entry: str, text: str) -> dict[str, Any]:
    """Describe a launch to the verifier: sizes, and what the kernel loads of its parameters, pointers as such."""
    declared = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", text, re.S)
    assert declared is not None
    kinds = re.findall(r"\.param (?:\.align \d+ )?\.(\w+) \S+?_param_\d+(\[)?", declared[1])
    loads: set[tuple[int, int, str]] = set()
    pattern = rf"ld\.param\.(?:v(\d)\.)?(\w+)\s+[^\[]*\[{re.escape(entry)}_param_(\d+)(?:\+(\d+))?\]"
    for count, kind, number, offset in re.findall(pattern, text):
        width = _BYTES[kind[1:]]
        loads |= {(int(number), int(offset or 0) + i * width, kind) for i in range(int(count or 1))}
    values, pointers = [], []
    for number, offset, loaded in sorted(loads):
        kind, is_struct = (loaded, True) if kinds[number][1] else (kinds[number][0], False)
        field = {"parameter": f"{entry}_param_{number}", **({"offset": offset} if is_struct else {})}
        raw = launch.arguments[number][offset : offset + _BYTES[kind[1:]]]
        whole = int.from_bytes(raw, "little")
        real = struct.unpack({4: "<f", 8: "<d"}[len(raw)], raw)[0] if kind[0] == "f" else None
        if kind.endswith("64") and kind[0] != "f" and whole in _POINTERS:
            pointers.append({**field, "type": "pointer"})
        elif real is None:
            values.append({**field, "type": kind.replace("b", "u"), "value": whole})
        elif math.isfinite(real):  # JSON has no others
            values.append({**field, "type": kind, "value": real})
    sizes = {"grid_dim": launch.grid, "block_dim": launch.block}
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": sizes,
        "arguments": values,
        "declarations": pointers,
    }


def verdict(launch: Launch, module: Module) -> str:
    """Return ``PROVED``, the kind of bug that was found, or why the verifier could not decide."""
    entry = module.entries[launch.kernel]
    text = module.of(entry)
    with tempfile.TemporaryDirectory() as name:
        kernel, given = Path(name) / "kernel.ptx", Path(name) / "input.json"
        kernel.write_text(text)
        given.write_text(json.dumps(configuration(launch, entry, text)))
        command = [sys.executable, "-m", "sentryward", str(kernel), "--input", str(given), "--timeout", "120"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    if result["result"] != "unsupported":
        return str(result["result"])
    return f"undecided: {result['diagnostics'][0]['code'].replace('_', ' ')}"


@cache
def module() -> Module:
    """PTX of all kernels, compiled once in a session."""
    return Module(once("ptx", ptx))


def tracked() -> dict[tuple[str, ...], str]:
    """The table as it was last written."""
    with TABLE.open(newline="") as file:
        return {tuple(row[c] for c in COLUMNS[:-1]): row["verdict"] for row in csv.DictReader(file)}


def main() -> None:
    rows = [(*launch.key, verdict(launch, module())) for launch in launches()]
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
