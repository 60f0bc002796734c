"""Stopping a run between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Raised where a signal has stopped a run with its state saved. signal: the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Interruption:
    """Whether a stop is requested, and by which signal."""

    def __init__(self) -> None:
        self.requested = False
        self.signal: int = signal.SIGINT


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Turn Ctrl-C and SIGTERM into a request to stop after the step; the same signal again stops at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        interruption.requested, interruption.signal = True, number

    for number in before:
        signal.signal(number, request)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
