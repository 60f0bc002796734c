"""Execution of the passes over calls of the critic: by a cached program, found in C++ or Python, or traced anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.critic import program
from gpkernels.critic.by_autograd import by_autograd, left_to_autograd
from gpkernels.critic.call import Group, Pass, call
from gpkernels.critic.compiled import chosen
from gpkernels.critic.generic import Outsider
from gpkernels.critic.graph import native, reentrant
from gpkernels.critic.parts import Norm, Task
from gpkernels.critic.together import Check, Log, autocasts
from gpkernels.critic.work import Known, work
from gpkernels.ops.gradient_norm_penalty import REDUCTIONS
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.private import dual_level

NOTHING: Mapping[str, Any] = {}
Calls = tuple[tuple[tuple[str, bool], ...], ...]
Results = tuple[list[Any], list[tuple[Tensor, Tensor]], list[tuple[str, Tensor]]]


class Signed:
    """Calls of the critic with their signature. ``run`` consumes them."""

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
        self.native_matches = all(one.native_matches for one in passes)
        sparse = any(leaf.layout != torch.strided for leaf in self.leaves)  # their gradients may be, too
        self.hooked = sparse or any(one.by_engine or _has_hooks(one) for one in passes)
        key = tuple([one.key for one in passes]), tuple(mine), task
        self.signature = program.signatures.get(key, lambda: Known([one.key for one in passes], mine))
        self.known: Known = self.signature.known
        self.unfolded = any(one.unfolded for one in passes)
        if self.unfolded and (self.hooked or any(self.known.generic)):
            raise reentrant()

    def run(self, numbers: Sequence[Tensor]) -> Results:
        """Return values, the leaves' gradients, and those at samples, where wanted. numbers: one, and the weights."""
        known, task = self.known, self.task
        if self.hooked:
            return by_autograd(self.passes, self.leaves, task, numbers[1:])
        outsiders = [
            Outsider(one.nodes, frozenset(i for i, call in enumerate(plan.calls) if call.leaf)) if generic else None
            for one, plan, generic in zip(self.passes, known.plans, known.generic, strict=True)
        ]
        inputs: list[Tensor | None] = [*numbers]
        names = []
        while self.passes:  # frees their tensors as soon as they have been read
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
        return _sorted(list(results), len(VALUES) + len(task.penalties), self.leaves, names)


def _has_hooks(one: Pass) -> bool:
    """Whether gradients within a call, or at its batch, are seen by hooks, which only C++ can tell."""
    if backends.program is None:
        return False
    found: bool = native().hooked([u for u in one.outputs if u.requires_grad], one.x, one.start)
    return found


def _sorted(results: list[Any], values: int, leaves: Sequence[Tensor], names: Sequence[str]) -> Results:
    gradients, at_samples = results[values : values + len(leaves)], results[values + len(leaves) :]
    found = [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None]
    return results[:values], found, [(n, g) for n, g in zip(names, at_samples, strict=True) if g is not None]


class _Shelf:
    """Native cache of programs, keyed by the graphs of the critic's outputs."""

    def __init__(self) -> None:
        self._tags: dict[Any, int] = {}
        self._count = count()

    def _tag(self, task: Task, calls: Calls) -> int:
        key = task, calls, chosen()
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
        weights: Sequence[float],
        log: Log | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = NOTHING,
    ) -> Any:
        """Run a whole step, or a penalty alone, in C++.

        Returns the values, of which the first, or that of a penalty alone, has its gradients; or (what came of the
        calls, the key to ``keep`` a program under), if there is no program yet; or None before any call, where the
        native path does not apply.

        tensors: fake, real, and the points of the penalties; a ``Between`` as a tuple.
        """
        if _native_path_is_off():
            return None
        logged = None if log is None else log.native()
        if how.native is None or how.options is not chosen():
            how.options = chosen()
            alone = PENALTY if how.task.adversarial is None else LOSS
            how.native = backends.program.How(
                how.places, how.moves, how.task.pack, self._tag(how.task, how.calls), alone
            )
        return native().step(critic, tensors, how.native, logged, args, kwargs, weights)

    def by_autograd(
        self,
        critic: Any,
        tensors: tuple[Any, Any, Any],
        how: How,
        weights: Sequence[float],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = NOTHING,
    ) -> Any:
        """Run a whole step in C++ for a critic that is left to autograd.

        Returns what ``step`` returns, without a key.
        """
        left = None if _native_path_is_off() else how.left(weights)
        return None if left is None else native().by_autograd(critic, tensors, left, args, kwargs)

    def run(self, passes: Sequence[Pass], task: Task, numbers: Sequence[Tensor]) -> Results | bytes | None:
        """Return the results of calls that were made, or the key to ``keep`` a program under, or None.

        None: the native path does not apply.
        """
        if _native_path_is_off():
            return None
        tag = self._tag(task, tuple([(*one.groups, ("wants", one.wants)) for one in passes]))
        found = native().run([(one.outputs, one.x, one.start) for one in passes], tag, list(numbers))
        if found is None or type(found) is bytes:
            return found
        results, leaves = found
        names = [name for one in passes for name, _ in one.groups]
        return _sorted(results, len(VALUES) + len(task.penalties), leaves, names)

    def keep(self, key: bytes | None, signed: Signed) -> None:
        """Add the signature's program to the native cache, if it runs without Python."""
        known = signed.signature.native
        if key is None or known is None or signed.hooked:
            return
        if signed.native_matches and all(map(is_plain, signed.leaves)):
            native().add(key, known)


VALUES = "loss", "adversarial", "consistency"  # then the penalties: the results of a step besides gradients
LOSS, PENALTY = 0, len(VALUES)  # places among the values
shelf = _Shelf()


def forget() -> None:
    """Clear all signatures and their programs."""
    program.signatures.clear()
    if backends.program is not None:
        native().clear()


class How:
    """Calls of the critic in a step, each with groups of samples by name and whether they are penalised.

    places: of the groups' samples among fake, real and the points of each penalty. moves: whether the gradient at a
    call's samples is needed. kinds, targets: ``ScoreLoss`` of each call's first group, -1 for none, and its constant.
    """

    def __init__(self, task: Task, calls: Calls) -> None:
        self.task, self.calls = task, calls
        self.places = [
            [PLACES[name] if name in PLACES else 2 + task.penalty(name) for name, _ in call] for call in calls
        ]
        self.moves = [any(penalised for _, penalised in call) for call in calls]
        losses = [None if task.adversarial is None else task.adversarial.of(call[0][0]) for call in calls]
        self.kinds = [-1 if loss is None else loss[0] for loss in losses]
        self.targets = [0.0 if loss is None else loss[1] for loss in losses]
        self.native: Any = None  # the same for ``_Shelf.step``, under the options in force
        self.options: Any = None

    def left(self, weights: Sequence[float]) -> Any:
        """Return the same for a critic that is left to autograd; None where C++ does not compute such a loss."""
        task = self.task
        paired = task.adversarial is not None and task.adversarial.paired
        if paired or task.consistency is not None or len(task.penalties) > 1:
            return None
        (_, norm), weight = task.penalties[0] if task.penalties else ("", Norm(0.0)), weights[0] if weights else 0.0
        if norm.reduction != REDUCTIONS["mean"]:
            return None
        ends = norm.target, norm.one_sided, norm.power, task.pack, weight
        return backends.program.Left(self.places, self.moves, self.kinds, self.targets, *ends)


PLACES = {"fake": 0, "real": 1, "again": 1}


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
    """Call the critic with each batch.

    wants: whether gradients at scored samples are requested. log: calls to compare with. before: outputs of the first
    calls, if they were already made.
    """
    passes = [
        Pass(critic, groups, False, x, start, u, task.pack)
        for groups, (u, x, start) in zip(batches, before, strict=False)
    ]
    for groups in batches[len(passes) :]:
        n = len(groups[0].batch)
        check = None if log is None else Check(log, n, n * len(groups))
        asks = wants and not all(g.penalised for g in groups)
        passes.append(call(critic, groups, asks, args, kwargs, task.pack, check))
        if check is not None:
            check.finish()
    return passes


def run(
    passes: list[Pass],
    task: Task,
    numbers: Sequence[Tensor],
    key: bytes | None = None,
    look: Callable[[Signed], None] | None = None,
) -> Results:
    """Return loss, adversarial, consistency and penalties; the leaves' gradients; those at the samples, where wanted.

    numbers: one, and the penalties' weights. key: the key to ``keep`` the program under, if C++ returned one. look:
    called with the signature before anything is computed.
    """
    if key is None and look is None:
        found = shelf.run(passes, task, numbers)
        if isinstance(found, tuple):
            return found
        key = found
    with own_dtypes(numbers[0].device):
        signed = Signed(passes, task)
        if look is not None:
            look(signed)
        plans = zip(signed.known.plans, signed.known.generic, strict=True)
        alone = any(generic and plan.leaves_too_much() for plan, generic in plans)
        if alone and not signed.hooked:  # hooks may free what a graph that lasts until backward needs
            left_to_autograd.add(passes[0].critic, passes[0].x.numel() // len(passes[0].groups))
        results = signed.run(numbers)
    shelf.keep(key, signed)
    return results


def _native_path_is_off() -> bool:
    """Whether the native path is unavailable or must not be used."""
    return backends.program is None or backends.forced() is not None or is_compiling() or dual_level() >= 0


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is of no subclass but ``Parameter``."""
    return type(x) in (Tensor, torch.nn.Parameter)


def own_dtypes(device: torch.device) -> Any:
    """Context manager that disables autocast: the passes choose their own dtypes."""
    return torch.autocast(device.type, enabled=False) if autocasts(device.type) else nullcontext()


def numbers_of(weights: Sequence[float], like: Tensor) -> list[Tensor]:
    """Return one and the weights as tensors that are never written to."""
    return [_scalar(value, accumulation_dtype(like.dtype), like.device) for value in (1.0, *weights)]


@lru_cache(64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    known = device.type in ("cpu", "cuda") and not program.watched() and not torch.is_inference_mode_enabled()
    return (_constant if known else _constant.__wrapped__)(value, dtype, device)
