"""The passes over calls of the critic with the losses at both ends: the function that programs are traced from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpkernels.critic.curved import CurvedPasses
from gpkernels.critic.parts import Task, rows_of_group
from gpkernels.critic.passes import Passes, totals
from gpkernels.critic.picked import planned
from gpkernels.critic.plan import Place, Plan
from gpkernels.critic.program import Outsider
from gpkernels.critic.rules.base import Meta
from gpkernels.ops.consistency import consistency_backward_op, consistency_term_op
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_backward_op, gradient_norm_penalty_op
from gpkernels.ops.relativistic_loss import relativistic_loss_backward_op, relativistic_loss_op
from gpkernels.ops.score_loss import score_loss_backward_op, score_loss_op
from gpkernels.ops.tensors import accumulation_dtype


class Known:
    """Facts that follow from a signature, shared by all its runs."""

    def __init__(self, keys: Sequence[Any], leaves: list[tuple[int, ...]]) -> None:
        self.keys, self.leaves = keys, leaves
        self.count = max((n for numbers in leaves for n in numbers), default=-1) + 1
        self.plans = []
        for graph, x_leaf, wants, groups, each, _, pack in keys:
            plain = sum(not penalised for _, penalised in groups)
            moving = {} if x_leaf is None else {x_leaf: wants}
            self.plans.append(planned(graph, moving, each * len(groups), each * plain, pack or 1))
        self.x = {numbers[key[1]] for key, numbers in zip(keys, leaves, strict=True) if key[1] is not None}
        # Cotangents in float16 are scaled up by this factor: the user's loss scale is applied too late for them.
        half = any(m.dtype == torch.float16 for plan in self.plans for call in plan.calls for m in call.outputs)
        self.scale = 1024.0 if half else 1.0
        self.generic = [any(c.rule is None and not c.leaf for c in plan.calls) for plan in self.plans]


class _One:
    """One pass in the traced work. gradients: parts of those of its leaves, once it has been made."""

    gradients: dict[int, Any]

    def __init__(self, key: Any, plan: Plan, tensors: list[Tensor | None], passes: Passes) -> None:
        _, _, self.wants, self.groups, _, metas, _ = key
        self.plan, self.passes = plan, passes
        self.scores, self.features = tensors[0], tensors[1] if len(metas) > 1 else None
        places = iter(plan.outputs)
        self.places = [next(places) if meta[4] else None for meta in metas]
        self.plain = [name for name, penalised in self.groups if not penalised]
        self.penalised = [name for name, penalised in self.groups if penalised]

    def rows(self, x: Tensor, name: str) -> Tensor:
        """Return a group's part of scores, features or the gradient at the batch."""
        return rows_of_group(x, self.groups, name)


def work(known: Known, task: Task, tensors: Sequence[Tensor | None], outsider: Outsider) -> list[Tensor | None]:
    """Return values, then gradients of leaves and of samples, as a function of the signature and the tensors alone.

    tensors: one, the weights of the penalties, then for each pass the outputs and the saved ones. Values: the loss, the
    adversarial loss, the consistency term, the penalties.
    """
    at = 1 + len(task.penalties)
    unit, *weights = tensors[:at]
    assert unit is not None
    ones = []
    for k, (key, plan) in enumerate(zip(known.keys, known.plans, strict=True)):
        given, saved = len(key[5]), plan.saved_count
        outputs = list(tensors[at : at + given])
        call = lambda what, u, k=k: outsider((k, *what), u)  # noqa: E731
        kind = CurvedPasses if CurvedPasses.fits(plan, key[2]) else Passes
        ones.append(_One(key, plan, outputs, kind(plan, tensors[at + given : at + given + saved], call)))
        at += given + saved
    wide = accumulation_dtype(ones[0].scores.dtype)  # type: ignore[union-attr]
    lifted = weights if known.scale == 1 else [w * known.scale for w in weights if w is not None]
    own, term, seeds = _heads(ones, task, wide, unit if known.scale == 1 else unit * known.scale)
    values: list[Tensor | None] = [None] * len(task.penalties)
    at_samples: list[Tensor | None] = []
    for one in ones:
        found, gradients = _one_pass(one, task, lifted, {p: u for p, u in seeds.items() if p[0] is one})
        values = [b if a is None else a for a, b in zip(values, found, strict=True)]
        at_samples += [None if g is None else _lowered(g, known.scale) for g in gradients]
        one.gradients = one.passes.leaves() if task.gradients else {}
    terms = [value * w for value, w in zip(values, weights, strict=True) if value is not None and w is not None]
    if term is not None and task.consistency is not None:
        terms.insert(0, term * task.consistency.weight)
    if task.adversarial is None:  # a penalty alone has no weight
        loss = None
    else:
        loss = own
        for scaled in terms:
            loss = scaled if loss is None else loss + scaled
        loss = loss.clone() if loss is own and loss is not None else loss
    at_leaves = _gradients(known, task, ones) if task.gradients else [None] * known.count
    return apart([loss, own, term, *values, *at_leaves, *at_samples], tensors)


Seeds = dict[tuple[Any, str], Tensor]


def _heads(ones: list[_One], task: Task, wide: torch.dtype, unit: Tensor) -> tuple[Tensor | None, Tensor | None, Seeds]:
    """Return the adversarial loss, the consistency term, and the cotangents of scores and features by group."""
    adversarial = task.adversarial
    if adversarial is None:
        return None, None, {}
    seeds: Seeds = {}
    loss = None
    scored = [(one, name) for one in ones for name, _ in one.groups if adversarial.of(name) is not None]
    scores = [one.rows(one.scores, name) for one, name in scored]  # type: ignore[arg-type]
    if adversarial.paired:
        pair = [next(s for s, (_, name) in zip(scores, scored, strict=True) if name == own) for own in ("real", "fake")]
        loss = relativistic_loss_op(*pair)
        if task.gradients:
            at = dict(zip(("real", "fake"), relativistic_loss_backward_op(unit.to(wide), *pair), strict=True))
            seeds = {(one, name): at[name] for one, name in scored}
    elif scored:
        kinds, targets = zip(*[adversarial.of(name) for _, name in scored], strict=True)
        options = list(kinds), list(targets)
        loss = score_loss_op(scores, *options)
        if task.gradients:
            seeds = dict(zip(scored, score_loss_backward_op(unit.to(wide), scores, *options), strict=True))
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


class _Ends:
    """Cotangents at a pass's outputs.

    pulled: those of the first pass back. own: additional ones of penalised rows, from a loss on their scores. plain:
    those of plain rows, where these are processed separately.
    """

    def __init__(self, one: _One) -> None:
        self._one, self._joint = one, not isinstance(one.passes, CurvedPasses)
        self.pulled: dict[Place, Tensor] = {}
        self.own: dict[Place, Tensor] = {}
        self.plain: dict[Place, Tensor] = {}

    def enter(self, place: Place, output: Tensor, seeds: dict[str, Tensor], ones: bool) -> None:
        """Add the groups' cotangents of an output; ``ones``: whether ones are pulled back at penalised rows."""
        one = self._one
        given = {name: seeds.get(name) for name, _ in one.groups}
        whole = lambda name: torch.zeros_like(one.rows(output, name))  # noqa: E731
        filled = lambda names: [whole(n) if (u := given[n]) is None else u for n in names]  # noqa: E731
        if any(given[name] is not None for name in one.penalised):
            _add(self.own, place, _cat(filled(one.penalised)))
        some_plain = bool(one.plain) and (ones or any(given[name] is not None for name in one.plain))
        pulled = [torch.ones_like(one.rows(output, name)) for name in one.penalised] if ones else []
        if not self._joint:
            if some_plain:
                _add(self.plain, place, _cat(filled(one.plain)))
            if pulled:
                _add(self.pulled, place, _cat(pulled))
        elif some_plain or pulled:
            rest = pulled if ones else [whole(name) for name in one.penalised]
            _add(self.pulled, place, _cat([*filled(one.plain), *rest]))


def _add(to: dict[Place, Tensor], place: Place, u: Tensor) -> None:
    to[place] = to[place] + u if place in to else u


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one_pass(
    one: _One, task: Task, weights: Sequence[Tensor | None], seeds: Seeds
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the penalties of a pass, and its groups' gradients at the samples, where wanted."""
    values: list[Tensor | None] = [None] * len(task.penalties)
    nothing: list[Tensor | None] = [None] * len(one.groups)
    top, at_features = one.places[0], one.places[1] if len(one.places) > 1 else None
    assert one.scores is not None
    ends = _Ends(one)
    of = {name: u for (_, name), u in seeds.items()}
    if top is not None:
        ends.enter(top, one.scores, of, True)
    features = {name: u for name, _ in one.groups if (u := of.get(f"features of {name}")) is not None}
    if at_features is not None and features:
        ends.enter(at_features, one.features, features, False)  # type: ignore[arg-type]
    if isinstance(one.passes, CurvedPasses):
        one.passes.plain_seeds = ends.plain
    if not one.penalised and not (task.gradients and ends.pulled):
        return values, nothing
    found = one.passes.pull(ends.pulled)
    gradient = None if one.plan.x is None else found.get(one.plan.x)
    if not one.penalised:
        return values, [None if gradient is None or not one.wants else one.rows(gradient, n) for n, _ in one.groups]
    meta = one.plan.x_meta
    if gradient is None:
        gradient = meta.zeros()
    count = meta.shape[0]
    at_points = gradient if gradient.shape[0] == count else gradient.narrow(0, gradient.shape[0] - count, count)
    directions = []
    for k, name in enumerate(one.penalised):
        size = count // len(one.penalised)
        own = at_points if size == count else at_points.narrow(0, k * size, size)
        which = task.penalty(name)
        values[which], direction = _penalised(own, task, which, weights[which])
        directions.append(direction)
    if task.gradients:
        assert one.plan.x is not None
        one.passes.push({one.plan.x: _cat(directions)})
        scale = _scale(one, task, ends.own, top)
        one.passes.bend({} if scale is not None else ends.own, scale)
    if not one.wants:
        return values, nothing
    return values, [None if is_so else one.rows(gradient, name) for name, is_so in one.groups]


def _penalised(gradient: Tensor, task: Task, which: int, weight: Tensor | None) -> tuple[Tensor, Any]:
    """Return the penalty on a group's gradient and, where wanted, its derivative by that gradient, times the weight."""
    target, one_sided, power, reduction = task.penalties[which][1]
    rows = task.rows(gradient)
    value, coefficient = gradient_norm_penalty_op(rows, target, one_sided, reduction, power)
    if not task.gradients:
        return value, None
    assert weight is not None
    direction = gradient_norm_penalty_backward_op(weight.to(value.dtype), rows, coefficient)
    return value, direction.reshape(gradient.shape)


def _scale(one: _One, task: Task, own: dict[Place, Tensor], top: Place | None) -> Tensor | None:
    """Return one factor per penalised row whose scores' cotangents are multiples of ones, else None."""
    if list(own) != [top] or top is None or one.plan.layouts is None or one.plan.curved:
        return None
    seed, rows = own[top], one.plan.rows - one.plan.plain
    linear = task.adversarial is not None and task.adversarial.linear and task.consistency is None
    if not (linear or seed.numel() == rows):
        return None
    return seed.reshape(rows, -1)[:, 0]


def _gradients(known: Known, task: Task, ones: list[_One]) -> list[Tensor | None]:
    """Return the gradient of every leaf; zeros where PyTorch has zeros, None where it has None."""
    parts: list[list[Any]] = [[] for _ in range(known.count)]
    blank: dict[int, Meta] = {}
    for one, numbers in zip(ones, known.leaves, strict=True):
        for k, more in one.gradients.items():
            parts[numbers[k]][:0] = more  # summed from the end: those of the first pass can be freed first
        ends = one.places[: 1 if task.consistency is None else 2] if one.plan.plain else []
        seeded = [place for place in ends if place is not None]
        for leaf in one.plan.reached(one.passes.bent(), one.places[0], seeded):
            blank[numbers[leaf.number]] = leaf.outputs[0]
    given = [number for number, found in enumerate(parts) if found and number not in known.x]
    sums = dict(zip(given, totals([parts[number] for number in given]), strict=True))
    gradients: list[Tensor | None] = []
    for number in range(known.count):
        if number in sums:
            gradients.append(_lowered(sums[number], known.scale))
        elif number in blank and number not in known.x:
            gradients.append(blank[number].zeros())
        else:
            gradients.append(None)
    return gradients


def _lowered(gradient: Tensor, scale: float) -> Tensor:
    """Undo the scale of a gradient, in a dtype that holds the result."""
    if scale == 1:
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale


def apart(results: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return results that share no memory with each other or an input, as they are scaled in place and returned."""
    taken = {x.untyped_storage()._cdata for x in inputs if x is not None and x.layout == torch.strided}
    found: list[Tensor | None] = []
    for x in results:
        if x is not None and x.layout != torch.strided:
            x = x.clone()
        elif x is not None:
            storage = x.untyped_storage()
            if storage._cdata in taken or storage.nbytes() != x.numel() * x.element_size():
                x = x.clone()
            taken.add(x.untyped_storage()._cdata)
        found.append(x)
    return found
