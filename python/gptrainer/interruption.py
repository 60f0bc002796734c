"""Ending a run between two steps when it is told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was stopped between two steps; its checkpoint holds all of it. signal: the number of what stopped it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Interruption:
    """Whether the run has been told to stop, and by which signal."""

    def __init__(self) -> None:
        self.requested = False
        self.signal: int = signal.SIGINT


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Ctrl-C and SIGTERM only ask, so that a step is never cut in two; the same signal again ends at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop_after_this_step(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        interruption.requested, interruption.signal = True, number

    for number in before:
        signal.signal(number, stop_after_this_step)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what runs at once, with Stopped, so that it can end what it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
