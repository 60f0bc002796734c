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
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backend": backends.forced() or "auto",
        "running": {device: backends.running(device) for device in ("cpu", *backends.GPUS)},
        "backends": {"reference": "available", **usable},
        "build": extension.build_info() if extension is not None else None,
        "build_error": backends.extension_error,
        "fast_paths": backends.fast_path_error or "loaded",
        "instruction_set": extension.instruction_set() if extension is not None else None,
        "ops": {
            name: {device: backends.running_op(name, device) for device in ("cpu", *backends.GPUS)}
            for name in sorted(ops.ALL)
        },
        "hardware": (
            "CPU kernels run on this machine's CPU; every CUDA and Triton kernel and critic steps, also compiled, have "
            "run on an NVIDIA H200 (PyTorch 2.13, CUDA 13.0), on no other GPU, with memcheck, racecheck and initcheck; "
            "kernels of score losses and tiles of wide heads have changed since"
        ),
    }


def processor() -> str:
    """Return the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
        f"gpkernels {known['gpkernels']}, torch {known['torch']}, {known['python']}",
        f"system: {known['system']}",
        f"processor: {known['processor']}",
        f"GPUs: {', '.join(known['gpus']) or 'none that PyTorch sees'}",
        f"backend: {known['backend']}; " + ", ".join(f"{d} tensors run on {b}" for d, b in known["running"].items()),
        *(f"  {name:<10} {state}" for name, state in known["backends"].items()),
    ]
    if known["build"]:
        build = known["build"]
        lines += [
            f"extension: for torch {build['oldest_torch']} or later; built with {build['torch']}, {build['compiler']}, "
            f"revision {build['revision']}",
            f"  flags             {build['flags']}",
            f"  instruction sets  {', '.join(build['instruction_sets'])}; this machine runs {known['instruction_set']}",
            f"  fast paths        {_fast_paths(known)}",
        ]
    else:
        lines.append(f"extension: not loaded: {known['build_error']}")
    devices = ("cpu", *backends.GPUS)
    width = max(map(len, known["ops"])) + 2
    lines.append(f"{'op':<{width + 2}}" + "".join(f"{f'on {device}':<12}" for device in devices).rstrip())
    for name, runs in known["ops"].items():
        lines.append(f"  {name:<{width}}" + "".join(f"{runs[device]:<12}" for device in devices).rstrip())
    lines += [known["hardware"]]
    return "\n".join(lines)


def _fast_paths(known: dict[str, Any]) -> str:
    if known["fast_paths"] == "loaded":
        return f"loaded, for torch {known['build']['torch'].partition('+')[0]} only"
    return f"not loaded: {known['fast_paths']}; to build them: GPKERNELS_BUILD=cpu {backends.REBUILD}"
