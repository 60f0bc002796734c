"""Calls of the critic gone through: by a program that C++ finds, by one that Python knows, or for the first time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.critic import program
from gpkernels.critic.by_autograd import by_autograd, plainly
from gpkernels.critic.call import Group, Pass, call, uncompiled
from gpkernels.critic.compiled import chosen
from gpkernels.critic.generic import Outsider
from gpkernels.critic.graph import native
from gpkernels.critic.parts import Task
from gpkernels.critic.together import Check, Log, autocasts
from gpkernels.critic.work import Known, work
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.private import dual_level

NOTHING: Mapping[str, Any] = {}
Results = tuple[list[Any], list[tuple[Tensor, Tensor]], list[tuple[str, Tensor]]]


class Signed:
    """Calls of the critic with their signature. ``run`` uses them up."""

    def __init__(self, passes: list[Pass], task: Task) -> None:
        self.passes, self.task = passes, task
        self.leaves: list[Tensor] = []
        numbers: dict[int, int] = {}
        mine = []
        for one in passes:
            one.read()
            for leaf in one.leaves:
                if numbers.setdefault(id(leaf), len(self.leaves)) == len(self.leaves):
                    self.leaves.append(leaf)
            mine.append(tuple([numbers[id(leaf)] for leaf in one.leaves]))
        self.told = all(one.told for one in passes)
        self.hooked = backends.program is not None and any(
            native().hooked([u for u in one.outputs if u.requires_grad], one.start) for one in passes
        )
        key = tuple([one.key for one in passes]), tuple(mine), task
        self.signature = program.signatures.get(key, lambda: Known([one.key for one in passes], mine))
        self.known: Known = self.signature.known

    def run(self, weight: Tensor) -> Results:
        """Loss, adversarial, penalty, consistency; the leaves' gradients; those at the samples, where wanted."""
        known, task = self.known, self.task
        if self.hooked:
            return by_autograd(self.passes, self.leaves, task, weight)
        outsiders = [
            Outsider(one.nodes, frozenset(i for i, call in enumerate(plan.calls) if call.leaf)) if generic else None
            for one, plan, generic in zip(self.passes, known.plans, known.generic, strict=True)
        ]
        inputs: list[Tensor | None] = [weight, number(1.0, weight)]
        names = []
        while self.passes:  # their tensors are let go of as soon as they have been read
            one = self.passes.pop(0)
            inputs += [u.detach() for u in one.outputs]
            inputs += one.saved
            names += [name for name, _ in one.groups]
            del one

        def outsider(what: Any, given: Sequence[Tensor | None]) -> list[Tensor | None]:
            chosen = outsiders[what[0]]
            assert chosen is not None
            return chosen(what[1:], given)

        results = self.signature.run(inputs, lambda tensors, outsider: work(known, task, tensors, outsider), outsider)
        return _sorted(list(results), self.leaves, names)


def _sorted(results: list[Any], leaves: Sequence[Tensor], names: Sequence[str]) -> Results:
    gradients, at_samples = results[4 : 4 + len(leaves)], results[4 + len(leaves) :]
    found = [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None]
    return results[:4], found, [(n, g) for n, g in zip(names, at_samples, strict=True) if g is not None]


class _Shelf:
    """Programs that C++ finds by itself, from the outputs of the critic's calls; where that was built."""

    def __init__(self) -> None:
        self._tags: dict[Any, int] = {}
        self._count = count()

    def _tag(self, how: How) -> int:
        key = how.task, how.calls, chosen()
        tag = self._tags.get(key)
        if tag is None:
            if len(self._tags) >= program.CAPACITY:
                self._tags.clear()
            tag = self._tags[key] = next(self._count)
        return tag

    def step(
        self,
        critic: Any,
        tensors: tuple[Any, Any, Any],
        how: How,
        weight: float,
        log: Log | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = NOTHING,
    ) -> tuple[Any, ...] | None:
        """The four values, the first, or that of a penalty alone, with its gradients; or what the critic gave in each
        call, and the key to ``keep`` a program under; None where C++ has no say and nothing was called.

        tensors: fake, real, and where the gradient is penalised; as tuple of a ``Between``.
        """
        if _others_look_on() or dual_level() >= 0:
            return None
        logged = None if log is None else log.native()
        with uncompiled():
            found: tuple[Any, ...] | None = native().step(
                *(critic, tensors, how.places, how.moves, logged, how.task.by_point, args, kwargs),
                *(self._tag(how), weight, PENALTY if how.task.adversarial is None else LOSS),
            )
        return found

    def by_autograd(
        self,
        critic: Any,
        tensors: tuple[Any, Any, Any],
        how: How,
        weight: float,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = NOTHING,
    ) -> Any:
        """What ``step`` gives, of a critic that is left to autograd; or [(output, batch)] of the calls that were made;
        None where C++ has no say."""
        task = how.task
        if _others_look_on() or dual_level() >= 0 or task.consistency is not None:
            return None
        ends = task.target, task.one_sided, task.by_point, weight
        with uncompiled():
            return native().by_autograd(critic, tensors, how.places, how.moves, how.kinds, args, kwargs, *ends)

    def run(self, passes: Sequence[Pass], task: Task, weight: Tensor) -> Results | bytes | None:
        """The results of calls that were made, or the key under which to ``keep`` a program; None where C++ has no
        say."""
        if _others_look_on():
            return None
        tag = self._tag(How(task, tuple([(*one.groups, ("wants", one.wants)) for one in passes]), [], [], []))
        found = native().run([(one.outputs, one.x, one.start) for one in passes], tag, weight, number(1.0, weight))
        if found is None or type(found) is bytes:
            return found
        results, leaves = found
        return _sorted(results, leaves, [name for one in passes for name, _ in one.groups])

    def keep(self, key: bytes | None, signed: Signed) -> None:
        """Let C++ find the signature's program, if there is one and nobody has to look at it."""
        known = signed.signature.program
        if key is None or known is None or not signed.told or signed.hooked or not all(map(_is_plain, signed.leaves)):
            return
        if len(known.parts) == 1 and known.parts[0].native is not None:
            native().add(key, known.parts[0].native)


LOSS, PENALTY = 0, 2  # places among the values
shelf = _Shelf()


def forget() -> None:
    """Let go of all signatures and their programs."""
    program.signatures.clear()
    if backends.program is not None:
        native().clear()


class How(NamedTuple):
    """What is done with the critic: its calls, each with groups of samples by name and whether they are penalised."""

    task: Task
    calls: tuple[tuple[tuple[str, bool], ...], ...]
    places: list[list[int]]  # of the groups' samples among fake, real and points
    moves: list[bool]  # whether the gradient at a call's samples is wanted
    kinds: list[int]  # the score loss of each call's first group, by ``ScoreLoss``; -1: it has none

    @staticmethod
    def of(task: Task, calls: tuple[tuple[tuple[str, bool], ...], ...]) -> How:
        places = [[PLACES[name] for name, _ in call] for call in calls]
        scored = {} if task.adversarial is None else {"real": task.adversarial.real, "fake": task.adversarial.fake}
        kinds = [scored.get(call[0][0], -1) for call in calls]
        return How(task, calls, places, [any(penalised for _, penalised in call) for call in calls], kinds)


PLACES = {"fake": 0, "real": 1, "again": 1, "points": 2}


def made(
    critic: Any,
    batches: Sequence[Sequence[Group]],
    task: Task,
    wants: bool = False,
    log: Log | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    before: Sequence[Any] = (),
) -> list[Pass]:
    """Call the critic with each batch. wants: whether gradients at samples that are scored are asked for. log: what
    calls are held against. before: what came of the first calls, if they were made."""
    passes = [
        Pass(critic, groups, False, x, start, u, task.by_point)
        for groups, (u, x, start) in zip(batches, before, strict=False)
    ]
    for groups in batches[len(passes) :]:
        n = len(groups[0].batch)
        check = None if log is None else Check(log, n, n * len(groups))
        asks = wants and not all(g.penalised for g in groups)
        passes.append(call(critic, groups, asks, args, kwargs, task.by_point, check))
        if check is not None:
            check.finish()
    return passes


def run(
    passes: list[Pass],
    task: Task,
    weight: Tensor,
    key: bytes | None = None,
    look: Callable[[Signed], None] | None = None,
) -> Results:
    """Loss, adversarial, penalty, consistency; the leaves' gradients; those at the groups' samples, where wanted.

    key: what to keep the program under, where C++ gave it. look: sees a signature before anything is computed.
    """
    if key is None and look is None:
        found = shelf.run(passes, task, weight)
        if isinstance(found, tuple):
            return found
        key = found
    with own_dtypes(weight.device):
        signed = Signed(passes, task)
        if look is not None:
            look(signed)
        if any(signed.known.generic) and any(plan.leaves_too_much() for plan in signed.known.plans):
            plainly.add(passes[0].critic, passes[0].x.numel() // len(passes[0].groups))
        results = signed.run(weight)
    shelf.keep(key, signed)
    return results


def _others_look_on() -> bool:
    """Whether C++ is not there, or not to be asked."""
    return backends.program is None or backends.forced() is not None or is_compiling()


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)


def own_dtypes(device: torch.device) -> Any:
    """The passes choose their own dtypes."""
    return torch.autocast(device.type, enabled=False) if autocasts(device.type) else nullcontext()


def number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor, which nobody writes to."""
    return _scalar(value, accumulation_dtype(like.dtype), like.device)


@lru_cache(64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    known = device.type in ("cpu", "cuda") and not program.watched() and not torch.is_inference_mode_enabled()
    return (_constant if known else _constant.__wrapped__)(value, dtype, device)
