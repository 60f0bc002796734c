"""Versions, backends and build facts: `gpkernels info`."""

from __future__ import annotations

import csv
import platform
from pathlib import Path
from typing import Any

import torch

from gpkernels import backends, ops
from gpkernels.version import __version__


def facts() -> dict[str, Any]:
    """Collect versions, backends with the reason where one cannot run, build facts, and the backend of each op."""
    extension = backends.extension
    usable = {
        name: backends.unavailable(name) or "available" for name in backends.NAMES if name not in ("auto", "reference")
    }
    return {
        "gpkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "backend": backends.forced() or "auto",
        "running": {device: backends.running(device) for device in ("cpu", *backends.GPUS)},
        "backends": {"reference": "available", **usable},
        "build": extension.build_info() if extension is not None else None,
        "build_error": backends.extension_error,
        "direct": backends.direct is not None,
        "instruction_set": extension.instruction_set() if extension is not None else None,
        "ops": {
            name: {device: backends.running_op(name, device) for device in ("cpu", *backends.GPUS)}
            for name in sorted(ops.ALL)
        },
        "hardware": (
            "CPU kernels run on this machine's CPU; every CUDA and Triton kernel but attention's and the critic steps "
            "have run on an NVIDIA H200 (PyTorch 2.11, CUDA 13.0), on no other GPU; memcheck and racecheck ran there "
            "before interpolate, score_loss and gradient_norm_penalty changed and relativistic_loss was written"
        ),
    }


def kernels() -> str:
    """Format the resource tables of the GPU kernels, as last compiled; tests compare the kernels with them."""
    parts = []
    for path in sorted(Path(__file__).parent.glob("*_kernels.csv")):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        parts.append("\n".join([path.stem.replace("_", " "), *lines]))
    return "\n\n".join(parts)


def render() -> str:
    """Format the facts as text."""
    known = facts()
    lines = [
        f"gpkernels {known['gpkernels']}, torch {known['torch']}, Python {known['python']}, {known['machine']}",
        f"backend: {known['backend']}; " + ", ".join(f"{d} tensors run on {b}" for d, b in known["running"].items()),
        *(f"  {name:<10} {state}" for name, state in known["backends"].items()),
    ]
    if known["build"]:
        build = known["build"]
        lines += [
            f"extension: built with torch {build['torch']}, {build['compiler']}, revision {build['revision']}",
            f"  flags             {build['flags']}",
            f"  instruction sets  {', '.join(build['instruction_sets'])}; this machine runs {known['instruction_set']}",
            f"  from Python       {'directly' if known['direct'] else 'through torch.ops, as no fast path is built'}",
        ]
    else:
        lines.append(f"extension: not loaded: {known['build_error']}")
    devices = ("cpu", *backends.GPUS)
    lines.append(f"{'op':<34}" + "".join(f"{f'on {device}':<12}" for device in devices).rstrip())
    for name, runs in known["ops"].items():
        lines.append(f"  {name:<32}" + "".join(f"{runs[device]:<12}" for device in devices).rstrip())
    lines += [known["hardware"]]
    return "\n".join(lines)
