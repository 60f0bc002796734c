"""Tables of the site, from the tracked measurements in bench/results. No figure is typed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from math import exp, log
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
XEON, H200 = "xeon-avx512-1-thread", "nvidia-h200-report"  # files of times, and the report of a GPU
PEERS = "gpkernels", "eager"
Row = dict[str, Any]


def _read(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{H200}.json").read_text(encoding="utf-8"))
    return found


def _reported(part: str) -> list[Row]:
    """Rows of a part of the GPU's report."""
    results = _report()["parts"][part]["results"]
    rows: list[Row] = results if isinstance(results, list) else results["rows"]
    return rows


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _speedups(rows: Iterable[Row], peer: str = "gpkernels") -> dict[tuple[str, str], float]:
    """Map (critic, what) to eager PyTorch's time over that of a peer."""
    found = {}
    for row in rows:
        if row["peer"] == peer:
            critic, _, what = row["case"].rpartition(", ")
            found[critic, what] = float(row["speedup"])
    return found


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def devices() -> str:
    """Name what was measured on."""
    xeon = _read(f"{XEON}-steps")[0]
    report = _report()
    threads = report["parts"]["bench steps"]["results"]["machine"]["threads"]
    rows = [
        (f"`{XEON}-steps.csv`", xeon["device"], xeon["threads"], xeon["torch"]),
        (f"`{H200}.json`", report["device"], threads, report["torch"]),
    ]
    return _table(("file", "device", "threads", "PyTorch"), rows)


def steps() -> str:
    """Compare all critics of `gpkernels bench steps` on both devices, those that gain least first."""
    xeon, h200 = _speedups(_read(f"{XEON}-steps")), _speedups(_reported("bench steps"))
    critics = dict.fromkeys(critic for critic, _ in xeon)
    whats = ("penalty", "step")

    def line(critic: str) -> list[float | None]:
        return [found.get((critic, what)) for found in (xeon, h200) for what in whats]

    usual = sorted(
        (critic for critic in critics if (critic, "step") in xeon), key=lambda critic: min(filter(None, line(critic)))
    )
    head = ("critic", "Xeon: penalty", "step", "H200: penalty", "step")
    rows = [(critic, *map(_shown, line(critic))) for critic in usual]
    rows += [
        (f"{critic}, {what}", _shown(value), "", _shown(h200.get((critic, what))), "")
        for (critic, what), value in xeon.items()
        if what not in whats
    ]
    columns = [[value for value in column if value is not None] for column in zip(*map(line, usual), strict=True)]
    means = ("*geometric mean*", *(_shown(exp(sum(map(log, column)) / len(column))) for column in columns))
    return _table(head, [means, *rows])


def programs() -> str:
    """Compare whole training steps of published programs, those that gain most first."""
    rows = sorted(_read(f"{XEON}-programs"), key=lambda row: -float(row["eager_over_gpkernels"]))
    h200 = {row["program"]: list(row.values())[1:] for row in _reported("programs")}
    head = ("program", "Xeon: eager, ms", "gpkernels, ms", "eager over it", "H200: eager, ms", "gpkernels, ms")
    return _table((*head, "eager over it"), [[*row.values(), *h200[row["program"]]] for row in rows])


def compiled() -> str:
    """Compare compiled steps with eager PyTorch's."""
    peers = {"gpkernels": "gpkernels", "gpkernels, Inductor": "by Inductor", "gpkernels, backend": "by its backend"}
    peers["compile"] = "PyTorch's own, compiled"
    found = {peer: _speedups(_read(f"{XEON}-compiled"), peer) for peer in peers}
    critics = [critic for critic, what in found["gpkernels"] if what == "step"]
    rows = [(critic, *(_shown(found[peer].get((critic, "step"))) for peer in peers)) for critic in critics]
    return _table(("critic, WGAN-GP step", *peers.values()), rows)


def launches() -> str:
    """Count the kernels that a step launches on a GPU."""
    rows = _reported("launches")
    shown = [(row["case"], row["launches"], row["eager_launches"], _shown(_share(row))) for row in rows]
    return _table(("WGAN-GP step", "launches", "eager PyTorch's", "share"), shown)


def _share(row: Row) -> float:
    return int(row["launches"]) / int(row["eager_launches"])


def ops() -> str:
    """Compare single ops with eager PyTorch on both devices."""
    xeon, h200 = (
        {re.sub(r" \d[\dx]*$", "", row["case"]): float(row["speedup"]) for row in rows if _is_ours(row)}
        for rows in (_read(XEON), _reported("bench ops"))
    )
    least = sorted(xeon, key=lambda case: xeon[case])
    return _table(("op", "Xeon", "H200"), [(case, _shown(xeon[case]), _shown(h200.get(case))) for case in least])


def attention() -> str:
    """Compare attention, its derivatives and steps of vision transformers on a GPU."""
    rows: dict[str, Row] = {}
    for row in _reported("bench attention"):
        rows.setdefault(row["case"], {})[row["peer"]] = row
    shown = [
        (case, _shown(float(found["gpkernels"]["speedup"])), *(f"{found[p]['peak_bytes'] / 1e6:.0f}" for p in PEERS))
        for case, found in rows.items()
    ]
    return _table(("float32", "eager over ours", "ours, MB", "eager, MB"), shown)


def _is_ours(row: Row) -> bool:
    return row["peer"] == "gpkernels" and row["suite"] == "ops" and not row["case"].startswith("torch.")
