"""Description of the machine, and of its load during a measurement."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import gpkernels
from gpkernels import info

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # from glibc's malloc.h
ASSUMED_CACHE = 32 << 20


def facts(device: torch.device) -> dict[str, Any]:
    """Collect device, versions, threads and load."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else info.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_mb": round(last_level_cache() / 2**20, 1),
        "gpkernels": gpkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(load(), 2),
    }


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def last_level_cache() -> int:
    """Return the bytes of the last-level cache, or a guess where the system has no entry."""
    sizes = [_bytes(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=ASSUMED_CACHE)


def memory() -> float:
    """Return the bytes of the machine's memory, infinity where the system does not tell."""
    names = "SC_PHYS_PAGES", "SC_PAGE_SIZE"
    if not all(name in getattr(os, "sysconf_names", ()) for name in names):
        return float("inf")
    pages, size = map(os.sysconf, names)
    return pages * size


def _bytes(path: Path) -> int:
    """Parse a file such as "2048K"."""
    text = path.read_text(encoding="utf-8").strip()
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit


def keep_freed_memory() -> bool:
    """Keep freed memory in the C library, however large; return whether that is supported.

    Otherwise page faults of newly mapped memory would dominate ops that allocate their result.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def warnings(before: float, stolen: float) -> list[str]:
    """Return reasons to distrust the times.

    before: load at the start of the run; stolen: usual ratio of wall to CPU time with one thread.
    """
    found = []
    if before > 0.5:
        found.append(f"the machine was busy when this began, with a load of {before:.1f}: times may be too long")
    if stolen > 1.2:
        found.append(f"others had the core for part of the time: the clock went {stolen:.2f} times as fast as the work")
    return found
