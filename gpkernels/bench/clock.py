"""Interleaved timing of several calls, so that all of them run under the same load."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
LEAST_SAMPLE = 2e-4  # seconds: shorter calls are repeated within a sample, for the clock's resolution
LEAST_ROUNDS, MOST_ROUNDS = 5, 400
L2_FLUSH = 256 << 20  # bytes: larger than the L2 cache of every GPU named here


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: minimum and median over the rounds.

    cpu: of the process, all its threads; on a GPU, the time between two events. wall: elapsed time.
    """

    cpu: float
    cpu_median: float
    wall: float
    wall_median: float
    rounds: int

    @property
    def spread(self) -> float:
        """Relative distance of the median from the minimum."""
        return self.cpu_median / self.cpu - 1


def time_in_turns(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time each call. seconds: approximate budget of one call over all rounds."""
    repeats = {name: _repeats(call) for name, call in calls.items()}
    sample = _sample_on_gpu if device.type == "cuda" else _sample
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    collects = gc.isenabled()
    gc.disable()
    try:
        for turn in range(MOST_ROUNDS):
            if turn >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name, call in calls.items():
                samples[name].append(sample(call, repeats[name]))
            gc.collect(0)
    finally:
        if collects:
            gc.enable()
    return {name: _summed_up(found) for name, found in samples.items()}


def _repeats(call: Call) -> int:
    """Return the number of repetitions per sample, warming the call up."""
    call()
    call()
    begun = time.perf_counter()
    call()
    taken = time.perf_counter() - begun
    return max(1, round(LEAST_SAMPLE / max(taken, 1e-7)))


def _sample(call: Call, repeats: int) -> tuple[float, float]:
    """Return (CPU, wall) seconds per call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def _sample_on_gpu(call: Call, repeats: int) -> tuple[float, float]:
    """Return (seconds between events, wall seconds), after flushing the L2 cache."""
    torch.empty(L2_FLUSH, dtype=torch.int8, device="cuda").zero_()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wall = time.perf_counter()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats, (time.perf_counter() - wall) / repeats


def _summed_up(samples: list[tuple[float, float]]) -> Timing:
    cpu, wall = ([1e6 * x for x in column] for column in zip(*samples, strict=True))
    return Timing(min(cpu), statistics.median(cpu), min(wall), statistics.median(wall), len(samples))
