"""Steps and penalties that are made once more in the way of the last one, in C++.

For a small critic, what surrounds its calls in Python, and the checks of what has not changed, cost as much as the
passes. What decided on a call is kept: options, the critic, its mode, dtypes, and the state of modules that a call
depends on. Where all of it is as before, the next one runs no Python but the critic's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.critic.by_autograd import left_to_autograd, owner_of
from gpkernels.critic.graph import native
from gpkernels.critic.parts import CriticLossParts, Task
from gpkernels.critic.run import How
from gpkernels.critic.surroundings import surroundings
from gpkernels.critic.together import Log

SCORED, AT_REAL, BETWEEN, MADE = range(4)  # where the samples of a penalty are, as in C++
PLACES = {"r1": SCORED, "r2": SCORED, "wgan-gp": BETWEEN, "dragan": MADE}
_PLAIN = {bool, int, float, str, type(None)}


class Settled(NamedTuple):
    """A step that was made, for the next one. native: makes it; the others decided on it, as in ``critic_step``."""

    native: Any
    task: Task
    weights: tuple[float, ...]
    as_one: bool
    mode: Any
    changes: int  # of what is left to autograd


class Way(NamedTuple):
    """How a call was made. left: whether the critic is left to autograd. log: of one batch of all samples.

    small: bytes of a batch below which all graphs are retained until the last call; 0 where that does not matter.
    """

    how: How
    weights: tuple[float, ...]
    left: bool
    log: Log | None = None
    small: int = 0


def record_of(
    critic: Any,
    real: Tensor,
    fake: Tensor | None,
    options: Sequence[Any],
    further: bool,
    way: Way,
    places: Sequence[int],
    make: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Return C++'s record of a call that was made in C++; None where the next one may differ without a sign of it.

    real, fake: samples, or points and None for a penalty. options: of the function, by which calls differ. further:
    whether there are further inputs. places: of the penalties' samples; make: makes them of the real ones.
    """
    kept, owner = _kept(options), owner_of(critic)
    if kept is None or not type(owner).__weakrefoffset__:
        return None
    task = way.how.task
    how = way.how.left(way.weights) if way.left else way.how.native
    log = None if way.log is None else way.log.native()
    most = left_to_autograd.most(critic) if way.left else 0
    names = tuple([name for name, _ in task.penalties]) if task.several else None
    parts = None if task.adversarial is None else CriticLossParts
    asked = owner, owner is critic, real, fake, kept, further
    made = how, log, way.weights, most, way.small, places, make, task.pack, names, parts
    return backends.program.Settled(surroundings(), native(), *asked, *made)


def _kept(options: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return options as they are now; None where one is of a type that may change and stay equal to itself."""
    kept = tuple([dict(x) if type(x) is dict else x for x in options])
    values = [v for x in kept for v in (x.values() if type(x) is dict else (x,))]
    return kept if {*map(type, values)} <= _PLAIN else None


class Memory:
    """The last penalties of one function."""

    def __init__(self) -> None:
        self._native: Any = None
        self._changes = -1  # of what is left to autograd, at the first record

    def again(
        self,
        critic: Any,
        options: tuple[Any, ...],
        real: Any,
        fake: Any = None,
        eps: Any = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make a penalty as one before.

        Returns the penalty; or (what was drawn, calls that were made, key), to be continued; or None, before anything
        is drawn or called, where there was none like it.
        """
        if is_compiling() or backends.program is None or self._changes != left_to_autograd.changes:
            return None
        return self._native.again(critic, options, real, fake, eps, args, kwargs)

    def keep(self, record: Any) -> None:
        """Keep what ``record_of`` returned."""
        if self._changes != left_to_autograd.changes:
            self._native, self._changes = backends.program.Memory(), left_to_autograd.changes
        if record is not None:
            self._native.add(record)
