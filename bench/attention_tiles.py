"""Time tiles of attention's Triton kernels on a GPU, to choose those of their launcher.

    .venv/bin/python bench/attention_tiles.py [--length T] [--compile] [--csv FILE]

Each kernel runs alone, on 16 heads of T tokens. Tiles that the GPU cannot hold are left out, with a line that says so.
Compiling takes most of the time, so all cores do that before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from gpkernels.triton.scaled_dot_product_attention import Sizes

launcher: Any = sys.modules[Sizes.__module__]  # the package has a function of this name

COLUMNS = ("dtype", "width", "kernel", "rows", "cols", "chunk", "warps", "stages", "us")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH, HEADS = 2, 8
ROUNDS = 10


class Tiles(NamedTuple):
    """Rows, columns, and how much of the width a product takes at a time; 0: all of it."""

    rows: int
    cols: int
    chunk: int
    warps: int
    stages: int = 1

    def constants(self, width: int) -> dict[str, int]:
        padded = max(64 if self.chunk else 16, 1 << (width - 1).bit_length())
        return {
            "PADDED": padded, "VALUES_PADDED": padded, "ROWS": self.rows, "COLS": self.cols,
            "CHUNK": self.chunk or padded, "num_stages": self.stages,
        }  # fmt: skip


TILES = {
    ("float32", 64): [
        *(Tiles(32, 32, 0, 4), Tiles(32, 32, 0, 8), Tiles(64, 32, 0, 8), Tiles(32, 16, 0, 4), Tiles(16, 32, 0, 4)),
    ],
    ("float32", 128): [
        *(Tiles(16, 16, 0, 4), Tiles(16, 16, 0, 8), Tiles(16, 32, 32, 8), Tiles(32, 32, 32, 8), Tiles(32, 32, 0, 8)),
    ],
    ("float32", 256): [Tiles(16, 32, 32, 4), Tiles(16, 32, 32, 8), Tiles(32, 32, 32, 8)],
    ("bfloat16", 64): [
        *(Tiles(64, 64, 0, 4), Tiles(64, 64, 0, 8), Tiles(64, 32, 0, 4), Tiles(64, 64, 0, 4, 2), Tiles(128, 64, 0, 8)),
    ],
    ("bfloat16", 128): [
        *(Tiles(64, 32, 0, 4), Tiles(32, 32, 0, 4), Tiles(64, 64, 0, 8), Tiles(64, 32, 0, 8), Tiles(32, 32, 0, 8)),
    ],
}  # by dtype and width of the heads


def calls(dtype: torch.dtype, width: int, length: int) -> list[Callable[[], Any]]:
    """Return a call of each op."""
    torch.manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(BATCH, length, HEADS, width, device="cuda").to(dtype).transpose(1, 2)

    query, key, value, cotangent, *tangents = (drawn() for _ in range(7))
    constants = None, False, width**-0.5
    output, logsumexp = launcher.scaled_dot_product_attention(query, key, value, *constants)
    kept = query, key, value, output, logsumexp
    tangent, mean = launcher.scaled_dot_product_attention_jvp(*tangents, *kept, *constants)
    return [
        partial(launcher.scaled_dot_product_attention, query, key, value, *constants),
        partial(launcher.scaled_dot_product_attention_backward, cotangent, *kept, *constants),
        partial(launcher.scaled_dot_product_attention_jvp, *tangents, *kept, *constants),
        partial(
            launcher.scaled_dot_product_attention_double_backward,
            *(*tangents, cotangent, *kept, tangent, mean, *constants),
        ),
    ]


class Watched:
    """Launches kernels one by one, by some tiles, and times each with events."""

    def __init__(self, tiles: Tiles, width: int, rounds: int) -> None:
        self.tiles, self.width, self.rounds = tiles, width, rounds
        self.us: dict[str, float] = {}

    def launch(self, sizes: Sizes, over: Callable[..., None], kernel: Any, *tensors: Tensor) -> None:
        constants = {**sizes.constants, **self.tiles.constants(self.width)}
        sizes = sizes._replace(constants=constants, warps=(self.tiles.warps, self.tiles.warps))
        over(sizes, kernel, *tensors)
        torch.cuda.synchronize()
        best = float("inf")
        for _ in range(self.rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            over(sizes, kernel, *tensors)
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) * 1e3)
        self.us[kernel.fn.__name__] = best


def timed(call: Callable[[], Any], tiles: Tiles, width: int, rounds: int) -> tuple[dict[str, float], list[Tensor]]:
    """Return the microseconds of each kernel of a call, and its results."""
    watched = Watched(tiles, width, rounds)

    def watching(over: Callable[..., None]) -> Any:
        return lambda sizes, kernel, *tensors: watched.launch(sizes, over, kernel, *tensors)

    with patch.multiple(Sizes, over_rows=watching(Sizes.over_rows), over_keys=watching(Sizes.over_keys)):
        results = call()
    return watched.us, list(results)


def compiled(name: str, width: int, tiles: Tiles) -> None:
    """Compile the kernels of some tiles, into Triton's cache, as far as the GPU can hold them."""
    for call in calls(DTYPES[name], width, 64):
        with suppress(triton.runtime.errors.OutOfResources):
            timed(call, tiles, width, 0)


def measured(name: str, width: int, length: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each kernel and its tiles; tiles that give other numbers than the first are an error."""
    for call in calls(DTYPES[name], width, length):
        exact: list[Tensor] = []
        for tiles in TILES[name, width]:
            try:
                times, found = timed(call, tiles, width, ROUNDS)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{name}, {width}, {tiles}: {error}", file=sys.stderr)
                continue
            exact = exact or found
            for x, y in zip(found, exact, strict=True):
                apart = float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30))
                if apart > (2e-2 if name == "bfloat16" else 1e-4):
                    raise AssertionError(f"{tiles}: the relative error is {apart:.1e}")
            for kernel, us in times.items():
                yield dict(zip(COLUMNS, (name, width, kernel, *tiles, round(us, 1)), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, metavar="T", help="tokens (default: 2048)")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention_tiles: expected a GPU that PyTorch sees, got none", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        wanted = [(*case, tiles) for case, several in TILES.items() for tiles in several]
        list(pool.map(compiled, *zip(*wanted, strict=True)))
    if options.compile:
        return 0
    rows = [row for case in TILES for row in measured(*case, options.length)]
    for row in rows:
        print(*row.values(), sep=",")
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
