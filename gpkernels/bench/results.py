"""Results as rows: CSV and JSON files, a table, and comparison of two files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

CONTEXT = ("device", "threads", "gpkernels", "torch")
LEAST_NOISE = 0.1  # the variation between runs of the same code on a quiet machine


class Unreadable(Exception):
    """A file of results that is missing, truncated or in another format."""


@dataclass(frozen=True)
class Row:
    """Result of one peer in one case.

    Times are microseconds per call: CPU time of the process, or between events on a GPU, and elapsed. speedup: eager's
    time over this one. limit_share: the machine's minimum over this time. flops, calls, bytes, peak_bytes: counted,
    where that is possible. axis, size: point of a curve.
    """

    suite: str
    case: str
    peer: str
    cpu_us: float
    cpu_median_us: float = math.nan
    wall_us: float = math.nan
    wall_median_us: float = math.nan
    rounds: int = 0
    speedup: float = math.nan
    limit_share: float = math.nan
    flops: int | None = None
    calls: int | None = None
    bytes: int | None = None
    peak_bytes: int | None = None
    axis: str = ""
    size: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity of the measurement."""
        return self.suite, self.case, self.peer

    @property
    def spread(self) -> float:
        """Median over minimum time, minus 1."""
        spread = self.cpu_median_us / self.cpu_us - 1
        return spread if math.isfinite(spread) else 0.0


COUNTS = ("flops", "calls", "bytes", "peak_bytes")


def write_csv(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write one line per row, starting with the device and the versions."""
    names = [f.name for f in fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*CONTEXT, *names])
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow([*(machine[name] for name in CONTEXT), *("" if _absent(v) else v for v in values)])


def write_json(path: Path, machine: dict[str, Any], rows: Sequence[Row], warnings: Sequence[str]) -> None:
    """Write everything; missing values are null."""
    plain = [{name: None if _absent(v) else v for name, v in asdict(row).items()} for row in rows]
    whole = {"machine": machine, "warnings": list(warnings), "rows": plain}
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV or JSON file. Raises Unreadable with the reason."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    try:
        found = json.loads(text)["rows"] if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        rows = [_parsed(values) for values in found]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unreadable(f"{path}: expected a file of results by gpkernels bench") from None
    if not rows:
        raise Unreadable(f"{path}: expected at least one result, got none")
    return rows


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _parsed(values: dict[str, Any]) -> Row:
    read: dict[str, Any] = {}
    for f in fields(Row):
        value = values[f.name]
        if f.name in ("suite", "case", "peer", "axis"):
            read[f.name] = str(value or "")
        elif value in (None, ""):
            read[f.name] = None if f.name in COUNTS else math.nan
        else:
            read[f.name] = int(value) if f.name in (*COUNTS, "rounds", "size") else float(value)
    return Row(**read)


def heading() -> str:
    """Format the heading of the table."""
    return (
        f"{'':<46} {'peer':<10} {'time':>11} {'spread':>7} {'eager/this':>10} {'of limit':>8} "
        f"{'ops':>6} {'GFLOP':>8} {'MB moved':>9} {'MB held':>8}"
    )


def line(row: Row) -> str:
    """Format a row of the table."""
    spread = "" if math.isnan(row.cpu_median_us) else f"{row.spread:.0%}"
    return (
        f"{row.case:<46} {row.peer:<10} {duration(row.cpu_us):>11} {spread:>7} {_number(row.speedup, '.2f'):>10} "
        f"{_number(row.limit_share, '.2f'):>8} {_number(row.calls, 'd'):>6} {_number(row.flops, '.3f', 1e9):>8} "
        f"{_number(row.bytes, '.2f', 1e6):>9} {_number(row.peak_bytes, '.2f', 1e6):>8}"
    ).rstrip()


def duration(microseconds: float) -> str:
    """Format a time with a suitable unit."""
    if microseconds < 1e3:
        return f"{microseconds:.2f} us"
    return f"{microseconds / 1e3:.2f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    if value is None or math.isnan(value):
        return ""
    return format(value if unit == 1 else value / unit, form)


@dataclass(frozen=True)
class Change:
    """text: what changed. worse: whether it is a regression."""

    text: str
    worse: bool


def changes(old: Iterable[Row], new: Iterable[Row], ours: str, eager: str) -> list[Change]:
    """List the differences between our own rows of two files.

    Times are compared as ratios to eager's in the same run, which is robust to load, beyond the spread of both runs;
    counts exactly, except for peak memory, in which PyTorch's libraries vary slightly.
    """
    before, after = ({row.key: row for row in rows} for rows in (old, new))
    found = []
    for key, then in before.items():
        if key[2] != ours:
            continue
        name = f"{key[0]}: {key[1]}"
        now = after.get(key)
        if now is None:
            found.append(Change(f"{name}: was not measured again", False))
            continue
        peer = (key[0], key[1], eager)
        found += _changed_time(name, then, now, before.get(peer), after.get(peer))
        found += _changed_counts(name, then, now)
    return found


def _changed_time(name: str, then: Row, now: Row, eager_then: Row | None, eager_now: Row | None) -> list[Change]:
    both = [row for row in (then, now, eager_then, eager_now) if row is not None]
    noise = LEAST_NOISE + max(min(row.spread, 0.5) for row in both)
    if eager_then is None or eager_now is None:
        ratio, unit = now.cpu_us / then.cpu_us, f"{duration(then.cpu_us)} -> {duration(now.cpu_us)}"
    else:
        ratio = then.speedup / now.speedup
        unit = f"{then.speedup:.2f} -> {now.speedup:.2f} times as fast as eager"
    if 1 / (1 + noise) <= ratio <= 1 + noise:
        return []
    return [Change(f"{name}: {unit}, {'slower' if ratio > 1 else 'faster'} beyond the noise of {noise:.0%}", ratio > 1)]


def _changed_counts(name: str, then: Row, now: Row) -> list[Change]:
    found = []
    for count in COUNTS:
        was, has = getattr(then, count), getattr(now, count)
        if was is None or has is None:
            continue
        slack = 0.05 * was + 4096 if count == "peak_bytes" else 0
        if abs(has - was) > slack:
            found.append(Change(f"{name}: {count.replace('_', ' ')} {was} -> {has}", has > was))
    return found
