"""Losses and their gradients by autograd's own engine, on graphs that are already built.

For critics with hooks, which the engine has to call, and for small critics with calls that have no rule, where the
engine is the fastest implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from gpkernels import backends
from gpkernels.critic.call import Pass, Plain
from gpkernels.critic.generic import edge_of
from gpkernels.critic.parts import Task, called, constant_scores, rows_of_group
from gpkernels.ops.consistency import consistency_term_reference
from gpkernels.ops.relativistic_loss import relativistic_loss_reference
from gpkernels.ops.score_loss import score_loss_reference


def by_autograd(
    passes: Sequence[Pass], leaves: Sequence[Tensor], task: Task, weights: Sequence[Tensor]
) -> tuple[Any, Any, Any]:
    """Return the values, the leaves' gradients and those at the groups' samples, like ``run.run``."""
    loss, own, term, *penalties = losses(passes, task, weights)
    values = [None if x is None else x.detach().clone() for x in (loss, own, term, *penalties)]
    if not task.gradients or loss is None or not loss.requires_grad:
        return values, [], []
    batches = {id(one.x) for one in passes}
    leaves = list({edge_of(x): x for x in leaves}.values())  # a value from outside of the critic is one in each pass
    trained = [x for x in leaves if id(x) not in batches]
    with nullcontext() if backends.program is None else backends.program.Unhooked(trained):
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [(x, g.clone()) for x, g in zip(leaves, found, strict=True) if g is not None and id(x) not in batches]
    at_batch = {id(x): g for x, g in zip(leaves, found, strict=True) if id(x) in batches}
    samples = []
    for one in passes:
        g = at_batch.get(id(one.x)) if one.wants else None
        plain = [name for name, penalised in one.groups if not penalised]
        samples += [] if g is None else [(name, rows_of_group(g, one.groups, name)) for name in plain]
    return values, gradients, samples


def losses(passes: Sequence[Pass | Plain], task: Task, weights: Sequence[Tensor | float]) -> tuple[Tensor | None, ...]:
    """Return the loss, the adversarial loss, the consistency term and the penalties, with their graph.

    The loss of a penalty alone is that penalty.
    """
    with torch.enable_grad():
        own, term = _scores(passes, task)
        values: list[Tensor | None] = [None] * len(task.penalties)
        for one in passes:
            for name, value in penalties_of(one, task):
                values[task.penalty(name)] = value
        share = 0.0 if task.consistency is None else task.consistency.weight
        weights = weights if task.adversarial is not None else [1.0]
        parts = [(own, 1.0), (term, share), *zip(values, weights, strict=True)]
        terms = [x if x is own else x * factor for x, factor in parts if x is not None]
        return (sum(terms[1:], terms[0]) if terms else None), own, term, *values


def owner_of(critic: Any) -> Any:
    """Return what a critic that is made anew for each call has in common with the one before.

    The object of a bound method; of a function, such as a lambda within a loop, the first module that it encloses, else
    its code; any other critic itself.
    """
    while type(critic) is partial:
        critic = critic.func
    if type(critic) is MethodType:
        return critic.__self__
    if type(critic) is not FunctionType:
        return critic
    for cell in critic.__closure__ or ():
        with suppress(ValueError):  # it is empty
            if isinstance(cell.cell_contents, nn.Module):
                return cell.cell_contents
    return critic.__code__


class _LeftToAutograd:
    """Registry of critics whose losses are left to autograd, by training mode, for batches up to a size.

    changes: their number.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], tuple[ReferenceType[Any], int]] = {}
        self.changes = 0

    def add(self, critic: Any, elements: int) -> None:
        owner = owner_of(critic)
        key = id(owner), _training(owner)
        if elements <= self.most(critic):
            return
        with suppress(TypeError):  # some callables cannot be referenced weakly
            self._known[key] = ref(owner, lambda _: self._known.pop(key, None)), elements
            self.changes += 1

    def has(self, critic: Any, batch: Tensor) -> bool:
        return bool(self._known) and batch.numel() <= self.most(critic)

    def most(self, critic: Any) -> int:
        """Return the size up to which the critic's batches are left to autograd, -1 if none are."""
        owner = owner_of(critic)
        known = self._known.get((id(owner), _training(owner)))
        return known[1] if known is not None and known[0]() is owner else -1


def _training(owner: Any) -> bool:
    return bool(getattr(owner, "training", False))


left_to_autograd = _LeftToAutograd()


def _rows(one: Pass | Plain, output: int, name: str) -> Tensor:
    return rows_of_group(one.outputs[output], one.groups, name)


def _scores(passes: Sequence[Pass | Plain], task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Compute the adversarial loss and the consistency term."""
    if task.adversarial is None:
        return None, None
    at = {name: one for one in passes for name, _ in one.groups}
    scored = {name: loss for name in ("real", "fake") if name in at and (loss := task.adversarial.of(name)) is not None}
    own = None
    if scored:
        scores = [_rows(at[n], 0, n) for n in scored]
        if task.adversarial.paired:
            own = relativistic_loss_reference(*scores)
        else:
            own = score_loss_reference(scores, [kind for kind, _ in scored.values()], [t for _, t in scored.values()])
    options = task.consistency
    if options is None or "again" not in at:
        return own, None
    names = "real", "again"
    scores = [_rows(at[n], 0, n) for n in names]
    some = len(at["real"].outputs) > 1
    features = [_rows(at[n], 1, n) if some else s.new_empty(len(s), 0) for n, s in zip(names, scores, strict=True)]
    first, second = zip(scores, features, strict=True)
    pairs = first[0], second[0], first[1], second[1]
    return own, consistency_term_reference(*pairs, options.margin, options.feature_weight)[0]


def penalties_of(one: Pass | Plain, task: Task) -> list[tuple[str, Tensor]]:
    """Return the penalty of each penalised group, with its graph where gradients are wanted."""
    penalised = [name for name, so in one.groups if so]
    if not penalised:
        return []
    scores = one.outputs[0]
    plain = (len(one.groups) - len(penalised)) * (scores.shape[0] // len(one.groups) if scores.dim() else 0)
    rows = scores if not plain else scores.narrow(0, plain, scores.shape[0] - plain)
    (gradient,) = torch.autograd.grad(
        rows, one.x, torch.ones_like(rows), create_graph=task.gradients, retain_graph=True, allow_unused=True
    )
    if gradient is None:
        raise constant_scores(called(task.pack))
    found = []
    for name in penalised:
        own = rows_of_group(gradient, one.groups, name)
        found.append((name, task.penalties[task.penalty(name)][1].of(own, task.pack)))
    return found
