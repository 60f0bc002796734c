"""One JSON file for each experiment and seed, complete or absent, valid only for its settings and version."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from gpkernels.arguments import replacing
from gptrainer.reproduce.experiment import Experiment, Findings, Size


def path_of(out: Path, experiment: Experiment, size: Size, seed: int) -> Path:
    """Path of a result."""
    return out / "results" / size / experiment.name / f"seed-{seed}.json"


def save(path: Path, experiment: Experiment, size: Size, seed: int, findings: Findings, seconds: float) -> None:
    """Write one result. seconds: duration of the measurement."""
    result = {"key": _key(experiment, size, seed), "seconds": round(seconds, 1), **_plain(vars(findings))}
    with replacing(path) as part:
        part.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")


def load(path: Path, experiment: Experiment, size: Size, seed: int) -> tuple[Findings, float] | None:
    """Read findings and their duration; None where there is no result for these settings and this version.

    A damaged file is reported on stderr and treated as absent.
    """
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        key, seconds = result["key"], float(result["seconds"])
        measures = {name: math.nan if value is None else float(value) for name, value in result["measures"].items()}
        findings = Findings(measures, dict(result["series"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"gpkernels reproduce: {path} is damaged; seed {seed} of {experiment.name} runs again", file=sys.stderr)
        return None
    return (findings, seconds) if key == _key(experiment, size, seed) else None


def _key(experiment: Experiment, size: Size, seed: int) -> Any:
    """Everything that a result depends on, as JSON."""
    key = {
        "experiment": experiment.name,
        "version": experiment.version,
        "seed": seed,
        "settings": dict(experiment.settings[size]),
    }
    return json.loads(json.dumps(key))


def _plain(value: Any) -> Any:
    """Round to six digits, more than a picture shows, and replace non-finite numbers by None."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
