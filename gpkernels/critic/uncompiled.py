"""Context in which compiled parts of a critic run eagerly."""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any

from gpkernels import backends
from gpkernels.private import OF_STANCE, compile_nothing, compiler, look_at_frames, look_at_no_frames, set_stance


class _Stance:
    """The stance outside of all ``uncompiled``, how many threads are inside, and C++'s stance there."""

    __slots__ = ("before", "inside", "lock", "nothing")

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.before: Any = None
        self.nothing: Any = None


class uncompiled:
    """Context manager in which compiled parts of a critic run eagerly: PyTorch cannot differentiate them twice.

    The compiler's stance is global, so the first thread to enter sets it and the last one to leave restores it. Frame
    evaluation is per thread.
    """

    __slots__ = ("_callback", "_entered")
    _stance = _Stance()  # not attributes of the class: to set those costs more than all the rest

    def __enter__(self) -> None:
        self._entered = compiler() is not None
        if not self._entered:  # nothing is compiled
            return
        self._callback = look_at_no_frames()  # otherwise no stance can be set
        stance = self._stance
        with stance.lock:
            if not stance.inside:
                stance.before = compile_nothing()
            stance.inside += 1

    def __exit__(self, *exception: object) -> None:
        if not self._entered:
            return
        stance = self._stance
        with stance.lock:
            stance.inside -= 1
            if not stance.inside:
                before, stance.before = stance.before, None
                set_stance(before)
        if self._callback is not None:
            look_at_frames(self._callback)


@cache
def native() -> Any:
    """Return what makes the same context in C++; only where ``backends.program`` is loaded."""
    return backends.program.Compiler(uncompiled, uncompiled._stance, *OF_STANCE)
