"""Times of calls taken in turns, so that all of them meet the same load."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
LEAST_SAMPLE = 2e-4  # seconds: shorter calls are repeated within a sample, or the clock would be what is measured
LEAST_ROUNDS, MOST_ROUNDS = 5, 400
L2_FLUSH = 256 << 20  # bytes: more than the L2 cache of any GPU we name


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the least and the median over the rounds.

    cpu: of the process, all its threads; on a GPU the time between two events there. wall: on the clock.
    """

    cpu: float
    cpu_median: float
    wall: float
    wall_median: float
    rounds: int

    @property
    def spread(self) -> float:
        """How far the median lies above the least, as a share of it."""
        return self.cpu_median / self.cpu - 1


def time_in_turns(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Each call's times. seconds: about what one call may take of all rounds together."""
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
    """How often a call fits into a sample; warms it up, too."""
    call()
    call()
    begun = time.perf_counter()
    call()
    taken = time.perf_counter() - begun
    return max(1, round(LEAST_SAMPLE / max(taken, 1e-7)))


def _sample(call: Call, repeats: int) -> tuple[float, float]:
    """(CPU, wall) seconds a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def _sample_on_gpu(call: Call, repeats: int) -> tuple[float, float]:
    """(seconds between events, wall seconds), the L2 cache flushed before."""
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
