"""Measurement of one case: every implementation, and the machine's minimum for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from gpkernels.bench.clock import Call, Timing, time_in_turns
from gpkernels.bench.counts import count
from gpkernels.bench.results import Row

OURS, EAGER, LIMIT = "gpkernels", "eager", "limit"
BY_INDUCTOR, AS_PROGRAM = f"{OURS}, Inductor", f"{OURS}, backend"
JVP_FLASH = "jvp_flash_attention"
PEERS = (EAGER, "compile", "jax", JVP_FLASH)
COMPILED = {"compile": (BY_INDUCTOR, AS_PROGRAM)}  # measured along with a peer
COUNTED = (OURS, EAGER)  # peers that bypass PyTorch's dispatcher are not counted


@dataclass(frozen=True)
class Trial:
    """One case.

    calls: by peer, constructed when measured. limit: a call of only what the hardware must do, ``limit_share`` times
    its size. axis, size: point of a curve.
    """

    suite: str
    case: str
    calls: Mapping[str, Callable[[], Call]]
    limit: Callable[[], Call]
    limit_share: float = 1.0
    axis: str = ""
    size: int = 0


@dataclass
class Measured:
    """rows: one per peer. absent: why a peer has none."""

    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


def measure(trial: Trial, peers: Collection[str], device: torch.device, seconds: float) -> Measured:
    """Time all calls of a trial, interleaved. seconds: approximate budget per call."""
    result = Measured()
    calls: dict[str, Call] = {}
    if "compile" in peers:
        torch.compiler.reset()  # functions compiled for other trials count against Dynamo's limits
    for name in (OURS, *(name for peer in peers for name in (peer, *COMPILED.get(peer, ())))):
        if name in trial.calls:
            try:
                calls[name] = _made(trial.calls[name])
            except Exception as error:  # a failing peer must not end the run
                if name == OURS:
                    raise
                result.absent[name] = _reason(error)
    times = time_in_turns({**calls, LIMIT: trial.limit()}, device, seconds)
    if "jax" in times:  # its thread's CPU time is accounted only later
        times["jax"] = replace(times["jax"], cpu=times["jax"].wall, cpu_median=times["jax"].wall_median)
    least = times.pop(LIMIT)
    bound = least.cpu / trial.limit_share
    eager = times[EAGER].cpu if EAGER in times else float("nan")
    for name, taken in times.items():
        result.rows.append(_row(trial, name, taken, eager / taken.cpu, bound / taken.cpu, calls[name], device))
    result.rows.append(
        Row(trial.suite, trial.case, LIMIT, round(bound, 3), speedup=round(eager / bound, 3), limit_share=1.0,
            rounds=least.rounds, axis=trial.axis, size=trial.size)
    )  # fmt: skip
    return result


def _made(make: Callable[[], Call]) -> Call:
    """Construct a call and run it once, so that compilation and failures happen here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers' warnings about the measured code
        call = make()
        call()
    return call


def _row(
    trial: Trial, peer: str, taken: Timing, speedup: float, limit_share: float, call: Call, device: torch.device
) -> Row:
    row = Row(
        trial.suite,
        trial.case,
        peer,
        round(taken.cpu, 3),
        round(taken.cpu_median, 3),
        round(taken.wall, 3),
        round(taken.wall_median, 3),
        taken.rounds,
        round(speedup, 3),
        round(limit_share, 3),
        axis=trial.axis,
        size=trial.size,
    )
    if peer not in COUNTED:
        return row
    counts = count(call, device)
    return replace(row, flops=counts.flops, calls=counts.calls, bytes=counts.bytes, peak_bytes=counts.peak)


def _reason(error: Exception) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
