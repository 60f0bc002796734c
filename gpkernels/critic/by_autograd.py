"""Losses and their gradients by autograd's own engine, on graphs that are already built.

For critics with hooks, which the engine has to call, and for small critics with calls that have no rule, where the
engine is the fastest implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from gpkernels.critic.call import Pass, Plain
from gpkernels.critic.parts import Task, constant_scores
from gpkernels.ops.consistency import consistency_term_reference
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty
from gpkernels.ops.score_loss import score_loss_reference


def by_autograd(passes: Sequence[Pass], leaves: Sequence[Tensor], task: Task, weight: Tensor) -> tuple[Any, Any, Any]:
    """Compute what ``run.run`` computes: the values, the gradients of the leaves, those at the groups' samples."""
    loss, own, value, term = losses(passes, task, weight)
    values = [None if x is None else x.detach().clone() for x in (loss, own, value, term)]
    if not task.gradients or not loss.requires_grad:
        return values, [], []
    batches = {id(one.x) for one in passes}
    found = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    gradients = [(x, g.clone()) for x, g in zip(leaves, found, strict=True) if g is not None and id(x) not in batches]
    at_batch = {id(x): g for x, g in zip(leaves, found, strict=True) if id(x) in batches}
    samples = []
    for one in passes:
        g = at_batch.get(id(one.x)) if one.wants else None
        plain = [name for name, penalised in one.groups if not penalised]
        samples += [] if g is None else [(name, g.narrow(0, i * one.each, one.each)) for i, name in enumerate(plain)]
    return values, gradients, samples


def losses(
    passes: Sequence[Pass | Plain], task: Task, weight: Tensor | float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the loss and its parts, with their graph."""
    with torch.enable_grad():
        own, term = _scores(passes, task)
        value = next((penalty_of(one, task) for one in passes if any(so for _, so in one.groups)), None)
        share = 0.0 if task.consistency is None else task.consistency.weight
        parts: list[tuple[Tensor | None, Any]] = [(own, None), (value, weight), (term, share)]
        terms = [x if factor is None else x * factor for x, factor in parts if x is not None]
        return sum(terms[1:], terms[0]), own, value, term


class _Plainly:
    """Registry of critics whose losses are left to autograd, by training mode, for batches up to a size."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], tuple[ReferenceType[Any], int]] = {}

    def add(self, critic: Any, elements: int) -> None:
        key = id(critic), _training(critic)
        with suppress(TypeError):  # some callables cannot be referenced weakly
            self._known[key] = ref(critic, lambda _: self._known.pop(key, None)), elements

    def has(self, critic: Any, batch: Tensor) -> bool:
        known = self._known.get((id(critic), _training(critic))) if self._known else None
        return known is not None and known[0]() is critic and batch.numel() <= known[1]


def _training(critic: Any) -> bool:
    return bool(getattr(critic, "training", False))


plainly = _Plainly()


def _rows(one: Pass | Plain, output: int, name: str) -> Tensor:
    at = [group for group, _ in one.groups].index(name)
    return one.outputs[output] if len(one.groups) == 1 else one.outputs[output].narrow(0, at * one.each, one.each)


def _scores(passes: Sequence[Pass | Plain], task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Compute the adversarial loss and the consistency term."""
    if task.adversarial is None:
        return None, None
    at = {name: one for one in passes for name, _ in one.groups}
    kinds = {"real": task.adversarial.real, "fake": task.adversarial.fake}
    scored = [name for name in kinds if name in at]
    own = None
    if scored:
        own = score_loss_reference([_rows(at[n], 0, n) for n in scored], [kinds[n] for n in scored])
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


def penalty_of(one: Pass | Plain, task: Task) -> Tensor:
    """Compute the penalty, with its graph where gradients are requested."""
    plain = sum(not penalised for _, penalised in one.groups) * one.each
    scores = one.outputs[0]
    rows = scores if not plain else scores.narrow(0, plain, one.each)
    ones = torch.ones_like(rows)
    (gradient,) = torch.autograd.grad(
        rows, one.x, ones, create_graph=task.gradients, retain_graph=True, allow_unused=True
    )
    if gradient is None:
        raise constant_scores()
    gradient = gradient.narrow(0, plain, one.each) if plain else gradient
    shaped = gradient.reshape(-1, gradient.shape[-1]) if task.by_point else gradient
    return gradient_norm_penalty(shaped, task.target, one_sided=task.one_sided)
