"""The Triton kernels compiled ahead of time for every named target: their resources equal the tracked table."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from shared import once

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "gpkernels" / "triton_kernels.csv"
COLUMNS = ("call", "kernel", "dtype", "target", "registers", "spills", "shared", "widest_load")
VERSION = "3.9.0"  # of the Triton that the table was made with
HALVES = (("sm_80", "sm_90"), ("sm_100", "gfx90a", "gfx942"))  # a process compiles for one of them
# Loads of less than 16 bytes: rows or windows of two elements, a reduction of one.
NARROW = (
    "gradient_norm_penalty of short rows",
    "score_loss of one score",
    "mean_pool",
    "mean_pool_backward",
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def measure(targets: tuple[str, ...]) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["PYTHONWARNINGS"] = "ignore"
    command = [sys.executable, str(ROOT / "tests" / "triton_resources.py"), *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@cache
def resources_of(targets: tuple[str, ...]) -> dict[tuple[str, ...], dict[str, Any]]:
    rows = once(f"triton_compiles_{targets[0]}", partial(measure, targets))
    return {tuple(row[c] for c in COLUMNS[:4]): row for row in rows}


@pytest.fixture
def resources() -> dict[tuple[str, ...], dict[str, Any]]:
    return {key: row for targets in HALVES for key, row in resources_of(targets).items()}


def tracked() -> dict[tuple[str, ...], dict[str, int]]:
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[c] for c in COLUMNS[:4]): {c: int(row[c]) for c in COLUMNS[4:]} for row in rows}


@pytest.mark.parametrize("row", tracked(), ids=lambda row: f"{row[0]} in {row[2]} on {row[3]}, {row[1]}")
def test_kernel_needs_what_the_table_says(row: tuple[str, ...]) -> None:
    import triton

    (targets,) = [half for half in HALVES if row[3] in half]
    now, before = resources_of(targets)[row], tracked()[row]
    of_tiles, amd = row[0].startswith("scaled_dot_product_attention"), row[3].startswith("gfx")
    # Derivatives of float32 spill with the tiles that are the fastest (bench/results/h200-attention-tiles.csv).
    assert now["spills"] <= (384 if of_tiles and row[2] == "fp32" else 0)
    assert now["registers"] <= ((512 if amd else 255) if of_tiles else 128)
    assert now["shared"] <= ((65536 if amd else 99 * 1024) if of_tiles else 16384)
    if triton.__version__ == VERSION:
        assert {column: now[column] for column in COLUMNS[4:]} == before


def test_table_lists_every_kernel_and_target(resources: dict) -> None:
    assert set(resources) == set(tracked())


def test_kernels_that_stream_read_16_bytes_at_a_time(resources: dict) -> None:
    streams = [row for row in resources.values() if not row["call"].startswith("scaled_dot_product_attention")]
    narrow = {row["call"] for row in streams if row["widest_load"] < 16}
    assert narrow <= set(NARROW)


def test_kernels_ask_for_nothing_that_one_vendor_alone_has(resources: dict) -> None:
    assert not [row for row in resources.values() if row["foreign"]]
    for file in (ROOT / "gpkernels" / "triton").glob("*.py"):
        assert not re.search(r"libdevice|inline_asm|language\.extra|tensor_descriptor|num_ctas", file.read_text()), file


def write_table() -> None:
    """Update the table after an intended change: ``python tests/test_triton_compiles.py``."""
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for targets in HALVES for row in measure(targets))


if __name__ == "__main__":
    write_table()
