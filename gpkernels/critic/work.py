"""The passes over calls of the critic with the losses at both ends: the function that programs are traced from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.curved import CurvedPasses
from gpkernels.critic.parts import Task
from gpkernels.critic.passes import Passes, totals
from gpkernels.critic.plan import Place, Plan
from gpkernels.critic.program import Outsider
from gpkernels.critic.rules.base import Meta
from gpkernels.ops.consistency import consistency_backward_op, consistency_term_op
from gpkernels.ops.gradient_norm_penalty import REDUCTIONS, gradient_norm_penalty_backward_op, gradient_norm_penalty_op
from gpkernels.ops.score_loss import score_loss_backward_op, score_loss_op
from gpkernels.ops.tensors import accumulation_dtype


class Known:
    """Facts that follow from a signature, shared by all its runs."""

    def __init__(self, keys: Sequence[Any], leaves: list[tuple[int, ...]]) -> None:
        self.keys, self.leaves = keys, leaves
        self.count = max((n for numbers in leaves for n in numbers), default=-1) + 1
        self.plans = []
        for graph, x_leaf, wants, groups, each, _ in keys:
            plain = sum(not penalised for _, penalised in groups)
            self.plans.append(Plan(graph, x_leaf, wants, each * len(groups), each * plain))
        self.x = {numbers[key[1]] for key, numbers in zip(keys, leaves, strict=True) if key[1] is not None}
        # Cotangents in float16 are scaled up by this factor: the user's loss scale is applied too late for them.
        half = any(m.dtype == torch.float16 for plan in self.plans for call in plan.calls for m in call.outputs)
        self.scale = 1024.0 if half else 1.0
        self.generic = [any(c.rule is None and not c.leaf for c in plan.calls) for plan in self.plans]


class _One:
    """One pass in the traced work."""

    def __init__(self, key: Any, plan: Plan, tensors: list[Tensor | None], passes: Passes) -> None:
        _, _, self.wants, self.groups, self.each, metas = key
        self.plan, self.passes = plan, passes
        self.scores, self.features = tensors[0], tensors[1] if len(metas) > 1 else None
        places = iter(plan.outputs)
        self.places = [next(places) if meta[4] else None for meta in metas]

    def rows(self, x: Tensor, name: str) -> Tensor:
        """Select a group's part of scores or features."""
        if len(self.groups) == 1:
            return x
        at = [n for n, _ in self.groups].index(name)
        return x.narrow(0, at * self.each, self.each)


def work(known: Known, task: Task, tensors: Sequence[Tensor | None], outsider: Outsider) -> list[Tensor | None]:
    """Compute the values, then gradients of leaves and of samples, from the signature and the tensors alone."""
    weight, unit, *_ = tensors
    at, ones = 2, []
    assert weight is not None
    assert unit is not None
    for k, (key, plan) in enumerate(zip(known.keys, known.plans, strict=True)):
        given, saved = len(key[5]), plan.saved_count
        outputs = list(tensors[at : at + given])
        call = lambda what, u, k=k: outsider((k, *what), u)  # noqa: E731
        kind = CurvedPasses if CurvedPasses.fits(plan, key[2]) else Passes
        ones.append(_One(key, plan, outputs, kind(plan, tensors[at + given : at + given + saved], call)))
        at += given + saved
    wide = accumulation_dtype(ones[0].scores.dtype)  # type: ignore[union-attr]
    unit, lifted = (unit, weight) if known.scale == 1 else (unit * known.scale, weight * known.scale)
    own, term, seeds = _heads(ones, task, wide, unit)
    value: Tensor | None = None
    at_samples: list[Tensor | None] = []
    for one in ones:
        penalty, gradients = _one_pass(one, task, lifted, {p: u for p, u in seeds.items() if p[0] is one})
        value = penalty if penalty is not None else value
        at_samples += [None if g is None else _lowered(g, known.scale) for g in gradients]
    loss = own
    if term is not None and task.consistency is not None:
        scaled = term * task.consistency.weight
        loss = scaled if loss is None else loss + scaled
    if value is not None:
        scaled = value * weight
        loss = scaled if loss is None else loss + scaled
    found = _gradients(known, ones) if task.gradients else [None] * known.count
    whole: list[Tensor | None] = [loss.clone() if loss is own and loss is not None else loss, own, value, term, *found]
    return _apart([*whole, *at_samples], tensors)


Seeds = dict[tuple[Any, str], Tensor]


def _heads(ones: list[_One], task: Task, wide: torch.dtype, unit: Tensor) -> tuple[Tensor | None, Tensor | None, Seeds]:
    """Compute the adversarial loss, the consistency term, and the cotangents of scores and features by group."""
    if task.adversarial is None:
        return None, None, {}
    kinds = {"real": task.adversarial.real, "fake": task.adversarial.fake}
    scored = [(one, name) for one in ones for name, _ in one.groups if name in kinds]
    seeds: Seeds = {}
    loss = None
    if scored:
        scores = [one.rows(one.scores, name) for one, name in scored]  # type: ignore[arg-type]
        chosen = [kinds[name] for _, name in scored]
        loss = score_loss_op(scores, chosen)
        if task.gradients:
            seeds = dict(zip(scored, score_loss_backward_op(unit.to(wide), scores, chosen), strict=True))
    if task.consistency is None or not any(name == "again" for one in ones for name, _ in one.groups):
        return loss, None, seeds
    return loss, _consistency(ones, task, wide, unit, seeds), seeds


def _consistency(ones: list[_One], task: Task, wide: torch.dtype, unit: Tensor, seeds: Seeds) -> Tensor:
    """Compute CT-GAN's term, and add its cotangents to ``seeds``."""
    options = task.consistency
    assert options is not None
    at = {name: one for one in ones for name, _ in one.groups}
    names = "real", "again"
    scores = [at[n].rows(at[n].scores, n) for n in names]  # type: ignore[arg-type]
    features = [at[n].rows(at[n].features, n) if at[n].features is not None else None for n in names]  # type: ignore[arg-type]
    pair = [scores[i].new_empty(scores[i].shape[0], 0) if f is None else f for i, f in enumerate(features)]
    tensors = [x.to(wide) for x in (*scores, *pair)]
    term, *coefficients = consistency_term_op(*tensors, options.margin, options.feature_weight)
    if not task.gradients:
        return term
    cotangent = unit.to(wide) * options.weight
    grads = consistency_backward_op(cotangent, *tensors, *coefficients, features[0] is not None)
    for i, name in enumerate(names):
        known = seeds.get((at[name], name))
        own = grads[i].to(scores[i].dtype)
        seeds[at[name], name] = own if known is None else known + own
        feature = features[i]
        if feature is not None:
            seeds[at[name], f"features of {name}"] = grads[2 + i].to(feature.dtype)
    return term


def _one_pass(one: _One, task: Task, weight: Tensor, seeds: Seeds) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute the penalty of a pass, if it has one, and its groups' gradients at the samples where wanted."""
    plain = [(name, penalised) for name, penalised in one.groups if not penalised]
    penalised = next((name for name, is_so in one.groups if is_so), None)
    top, at_features = one.places[0], one.places[1] if len(one.places) > 1 else None
    nothing: list[Tensor | None] = [None] * len(one.groups)
    cotangents: dict[Place, Tensor] = {}
    own: dict[Place, Tensor] = {}
    scores = one.scores
    assert scores is not None
    parts = []
    for name, is_penalised in one.groups:
        rows = one.rows(scores, name)
        seed = seeds.get((one, name))
        parts.append(torch.ones_like(rows) if is_penalised else torch.zeros_like(rows) if seed is None else seed)
        if is_penalised and seed is not None and top is not None:
            own[top] = seed
    plain_seeds: dict[Place, Tensor] = {}
    if top is not None:
        cotangents[top] = _joined(parts, one.passes, top, plain_seeds)
    features = {name: seeds.get((one, f"features of {name}")) for name, _ in one.groups}
    if at_features is not None and any(u is not None for u in features.values()):
        parts = []
        for name, is_penalised in one.groups:
            u = features[name]
            if is_penalised and u is not None:
                own[at_features] = own[at_features] + u if at_features in own else u
            blank = torch.zeros_like(one.rows(one.features, name))  # type: ignore[arg-type]
            parts.append(blank if u is None or is_penalised else u)
        if plain:
            joined = _joined(parts, one.passes, at_features, plain_seeds)
            cotangents[at_features] = cotangents[at_features] + joined if at_features in cotangents else joined
    if isinstance(one.passes, CurvedPasses):
        one.passes.plain_seeds = plain_seeds
    if penalised is None and not (task.gradients and cotangents):
        return None, nothing
    gradient = one.passes.pull(cotangents)
    if penalised is None:
        return None, [None if gradient is None or not one.wants else one.rows(gradient, n) for n, _ in one.groups]
    meta = one.plan.x_meta
    if gradient is None:
        gradient = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
    at_points = gradient if gradient.shape[0] == one.each else gradient.narrow(0, one.plan.plain, one.each)
    rows = at_points.reshape(-1, at_points.shape[-1]) if task.by_point else at_points
    value, coefficient = gradient_norm_penalty_op(rows, task.target, task.one_sided, REDUCTIONS["mean"])
    if task.gradients:
        direction = gradient_norm_penalty_backward_op(weight.to(value.dtype), rows, coefficient)
        one.passes.push(direction.reshape(at_points.shape))
        scale = _scale(one, task, own, top)
        one.passes.bend({} if scale is not None else own, scale)
    if not one.wants:
        return value, nothing
    return value, [None if is_so else one.rows(gradient, name) for name, is_so in one.groups]


def _joined(parts: list[Tensor], passes: Passes, place: Place, plain: dict[Place, Tensor]) -> Tensor:
    """Concatenate all groups' cotangents; the plain rows' go to ``plain`` where these are pulled separately."""
    if not isinstance(passes, CurvedPasses):
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    *others, penalised = parts
    joined = others[0] if len(others) == 1 else torch.cat(others)
    plain[place] = plain[place] + joined if place in plain else joined
    return penalised


def _scale(one: _One, task: Task, own: dict[Place, Tensor], top: Place | None) -> Tensor | None:
    """Return one factor per penalised row whose scores' cotangents are multiples of ones, else None."""
    if list(own) != [top] or top is None or one.plan.layouts is None or one.plan.curved:
        return None
    seed = own[top]
    linear = task.adversarial is not None and task.adversarial.linear and task.consistency is None
    if not (linear or seed.numel() == one.each):
        return None
    return seed.reshape(one.each, -1)[:, 0]


def _gradients(known: Known, ones: list[_One]) -> list[Tensor | None]:
    """Return the gradient of every leaf; zeros where PyTorch has zeros, None where it has None."""
    parts: list[list[Any]] = [[] for _ in range(known.count)]
    blank: dict[int, Meta] = {}
    for one, numbers in zip(ones, known.leaves, strict=True):
        for k, more in one.passes.leaves().items():
            parts[numbers[k]] += more
        for k, meta in one.plan.reached():
            blank[numbers[k]] = meta
    given = [number for number, found in enumerate(parts) if found and number not in known.x]
    sums = dict(zip(given, totals([parts[number] for number in given]), strict=True))
    gradients: list[Tensor | None] = []
    for number in range(known.count):
        if number in sums:
            gradients.append(_lowered(sums[number], known.scale))
        elif number in blank and number not in known.x:
            zeros = blank[number]
            gradients.append(torch.zeros(zeros.shape, dtype=zeros.dtype, device=zeros.device))
        else:
            gradients.append(None)
    return gradients


def _lowered(gradient: Tensor, scale: float) -> Tensor:
    """Undo the scale of a gradient, in a dtype that holds the result."""
    if scale == 1:
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale


def _apart(results: list[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copy results that share memory with each other or an input: they are scaled in place and returned to the user."""
    taken = {x.untyped_storage()._cdata for x in inputs if x is not None}
    found: list[Tensor | None] = []
    for x in results:
        if x is not None:
            storage = x.untyped_storage()
            if storage._cdata in taken or storage.nbytes() != x.numel() * x.element_size():
                x = x.clone()
            taken.add(x.untyped_storage()._cdata)
        found.append(x)
    return found
