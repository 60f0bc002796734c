"""Selection of checks, and their report: summary, table, JSON, and commands that repeat failed cases."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpkernels import backends
from gpkernels.verify.cases import CASES
from gpkernels.verify.critics import check_critic, check_zoo
from gpkernels.verify.ops import check_op, device_of
from gpkernels.verify.result import Result
from gpkernels.verify.training import STEPS, check_training

WHOLE = ("penalties", "training")  # in addition to the ops
NAMES = (*CASES, *WHOLE)


def runnable() -> list[str]:
    """List the backends that can run here."""
    found = ["reference", *(name for name in ("cpu", "cuda") if backends.unavailable(name) is None)]
    if backends.unavailable("triton") is None and (torch.cuda.is_available() or backends.interprets_triton()):
        found.append("triton")
    return [name for name in found if name != "cuda" or torch.cuda.is_available()]


def checks(chosen: Sequence[str], names: Sequence[str], dtypes: Sequence[str], quick: bool) -> Iterator[Result]:
    """Yield the results of the selected checks, in the order of the report."""
    for backend in chosen:
        device = device_of(backend)
        for name in names:
            for dtype in dtypes:
                if name in CASES:
                    yield from check_op(name, backend, dtype, quick)
                elif name == "penalties" and dtype in ("float64", "float32"):
                    yield from check_zoo(backend, dtype, device)
                elif name == "training" and dtype == "float64":
                    yield check_training(backend, device, STEPS // 10 if quick else STEPS)


def check_own(critic: nn.Module, shape: Sequence[int], name: str, chosen: Sequence[str]) -> Iterator[Result]:
    """Check every formulation on a user's critic, in float64 and float32."""
    for backend in chosen:
        for dtype in ("float64", "float32"):
            yield from check_critic(critic, shape, name, backend, dtype, device_of(backend))


def summary(results: Sequence[Result]) -> str:
    """Format the number of cases and the worst error of each backend and dtype."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        what = {"penalty": "penalties", "training": "training"}.get(r.check, "ops")
        groups.setdefault((r.backend, what, r.dtype), []).append(r)
    lines = [f"{'backend':<10} {'checked':<10} {'dtype':<9} {'cases':>6} {'failed':>6}   largest relative error"]
    for (backend, what, dtype), group in groups.items():
        measured = [r for r in group if r.check not in ("same bits", "edge values")]
        plain = _worst(measured, "plain")
        beside = "" if math.isnan(plain) else f", plain PyTorch {_number(plain)}"
        numbers = f"gpkernels {_number(_worst(measured, 'relative'))}{beside}"
        failed = sum(not r.ok for r in group)
        lines.append(f"{backend:<10} {what:<10} {dtype:<9} {len(group):>6} {failed:>6}   {numbers}")
    return "\n".join([*lines, "Errors are differences from float64, over its norm; --verbose prints each check."])


def verdict(results: Sequence[Result]) -> str:
    """Count the cases and those that failed."""
    failed = sum(not r.ok for r in results)
    return f"{len(results)} cases, {failed or 'none'} failed"


def table(results: Sequence[Result]) -> str:
    """Format the worst of each check, name, backend and dtype."""
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for r in results:
        groups.setdefault((r.backend, r.name, _check(r), r.dtype), []).append(r)
    lines = [
        "largest difference from float64: absolute; relative to its norm; the same of plain PyTorch in this dtype",
        f"{'backend':<10} {'op or critic':<28} {'check':<32} {'dtype':<9} {'cases':>5} "
        f"{'absolute':>9} {'relative':>9} {'PyTorch':>9}  verdict",
    ]
    for (backend, name, check, dtype), group in groups.items():
        numbers = " ".join(f"{_number(_worst(group, column)):>9}" for column in ("absolute", "relative", "plain"))
        found = "ok" if all(r.ok for r in group) else "FAILED"
        lines.append(f"{backend:<10} {name:<28} {check:<32} {dtype:<9} {len(group):>5} {numbers}  {found}")
    return "\n".join(lines)


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.1e}"


def _check(result: Result) -> str:
    return result.where if result.check == "penalty" else result.check


def _worst(group: Sequence[Result], column: str) -> float:
    return max((getattr(r, column) for r in group if not math.isnan(getattr(r, column))), default=math.nan)


def failures(results: Sequence[Result], own: str = "") -> list[str]:
    """Format a line for each failed case, and the command that repeats it. own: option that names a user's critic."""
    lines = []
    for r in results:
        if not r.ok:
            name = r.name if r.name in CASES else "training" if r.check == "training" else "penalties"
            again = own or f"--op {name} --dtype {r.dtype}"
            numbers = f"relative error {r.relative:.2e}, PyTorch's {r.plain:.2e}"
            lines.append(f"FAILED {r.check} of {r.name}, {r.backend}, {r.dtype}, {r.where}: {r.note or numbers}")
            lines.append(f"  again: gpkernels verify --backend {r.backend} {again}")
    return lines


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Write every result with versions and threads; non-finite numbers are null."""
    rows = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(r).items()} for r in results
    ]
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": rows}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
