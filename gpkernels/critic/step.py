"""A critic's penalty or whole loss with its weight gradients, computed together in the forward call.

The critic is called as it is; what autograd then knows of the call is gone through once, in the order that wastes
nothing, and nothing is ever differentiated twice.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from gpkernels import backends, ops
from gpkernels.critic import program
from gpkernels.critic.deliver import deliver
from gpkernels.critic.generic import Outsider
from gpkernels.critic.graph import Graph, attributes
from gpkernels.critic.parts import Adversarial, Between, Consistency, Parts, Penalty, points_of
from gpkernels.critic.passes import Passes, total
from gpkernels.critic.plan import Place, Plan
from gpkernels.critic.rules.base import Meta
from gpkernels.critic.together import Check, Differs, Seen, Watch, autocasts, keeps_apart, settled
from gpkernels.reference import REDUCTIONS, accumulation_dtype


def scores_of(output: Any) -> Tensor:
    """The scores in a critic's output: a tensor, or the first of a tuple."""
    scores = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(scores, Tensor):
        raise TypeError(f"critic: expected scores as a tensor, or first in a tuple, got {type(output).__name__}")
    return scores


def features_of(output: Any) -> Tensor | None:
    """What a critic gives beside its scores."""
    found = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    return found if isinstance(found, Tensor) else None


class Group(NamedTuple):
    """Samples by what they are: "fake", "real", "again" (real once more) or "points"."""

    name: str
    x: Tensor
    penalised: bool


class Pass:
    """One call of the critic, on one group of samples or several, and the graph that autograd kept of it.

    wants: whether the gradient at the batch is wanted.
    """

    def __init__(
        self,
        critic: Any,
        groups: Sequence[Group],
        wants: bool,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        pools: bool = False,
        looks_on: Watch | Check | None = None,
    ) -> None:
        self.groups = tuple([(g.name, g.penalised) for g in groups])
        self.each = len(groups[0].x)
        penalised = any(g.penalised for g in groups)
        self.x = _batch([g.x for g in groups], penalised or wants)
        self.start = 0 if backends.program is None else _get_sequence_nr()
        if isinstance(looks_on, Watch):
            looks_on.follow(self.x)
        with torch.enable_grad(), _uncompiled(), looks_on or nullcontext():
            output = critic(self.x, *args, **(kwargs or {}))
        scores, features = scores_of(output), features_of(output)
        self.outputs = [scores] if features is None else [scores, features]
        self.wants = wants
        if not pools and scores.numel() < len(self.x):
            raise ValueError(
                f"critic: expected a score for each of {len(self.x)} samples, got shape {tuple(scores.shape)}; "
                "for scores of several samples at once there is the option pack"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(scores).tangent is not None:
            raise RuntimeError(
                "the critic has a forward-mode tangent, which this penalty would not carry on; call it inside "
                "gpkernels.fast_double_backward(), where it is made of PyTorch's own operations"
            )
        if penalised and not scores.requires_grad:
            raise ValueError("critic: expected scores that depend on the input, got scores that do not")

    def read(self) -> None:
        """Read the graph: nodes, saved tensors, leaves, which of these is the batch, and the key."""
        roots = [u for u in self.outputs if u.requires_grad]
        self._read(roots)
        self.told = True  # whether C++ reads the same
        if (
            self.x_leaf is None and self.start and self.x.requires_grad
        ):  # made by another thread, which counts for itself?
            self.start, self.told = 0, False
            self._read(roots)
        if self.x_leaf is None and any(penalised for _, penalised in self.groups):
            raise ValueError("critic: expected scores that depend on the input, got scores that do not")
        metas = tuple([(u.shape, u.stride(), u.dtype, u.device, u.requires_grad) for u in self.outputs])
        self.key = self.graph_key, self.x_leaf, self.wants, self.groups, self.each, metas

    def _read(self, roots: list[Tensor]) -> None:
        graph = Graph(roots, self.start)
        self.graph_key, self.nodes, self.saved = graph.key, graph.nodes, graph.saved
        found = shelf.leaves(roots, self.start) if any(leaf is None for leaf in graph.leaves) else graph.leaves
        self.leaves = [leaf for leaf in found if leaf is not None]
        self.x_leaf = next((i for i, leaf in enumerate(self.leaves) if leaf is self.x), None)


def _uncompiled() -> Any:
    """Compiled parts of a critic run as they were written: PyTorch cannot differentiate a compiled part twice."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _batch(groups: list[Tensor], moves: bool) -> Tensor:
    """What the critic is called with; ``moves``: a leaf of its own, whose gradient can be had."""
    if len(groups) > 1:
        return torch.cat([g.detach() for g in groups]).requires_grad_(moves)
    (x,) = groups
    return x.detach().requires_grad_() if moves or x.requires_grad else x


class Task(NamedTuple):
    """What the passes are for. adversarial: None for a penalty alone; by_point: norms are over the last axis alone."""

    adversarial: Adversarial | None
    target: float
    one_sided: bool
    by_point: bool
    consistency: Consistency | None
    gradients: bool


Results = tuple[list[Any], list[tuple[Tensor, Tensor]], list[tuple[str, Tensor]]]


class Known:
    """What a signature says, once for all its runs."""

    def __init__(self, passes: Sequence[Pass], leaves: list[tuple[int, ...]]) -> None:
        keys = [one.key for one in passes]
        self.keys, self.leaves = keys, leaves
        self.count = max((n for numbers in leaves for n in numbers), default=-1) + 1
        self.plans = []
        for graph, x_leaf, wants, groups, each, _ in keys:
            plain = sum(not penalised for _, penalised in groups)
            self.plans.append(Plan(graph, x_leaf, wants, each * len(groups), each * plain))
        self.x = {numbers[key[1]] for key, numbers in zip(keys, leaves, strict=True) if key[1] is not None}
        self.generic = [any(c.rule is None and not c.leaf for c in plan.calls) for plan in self.plans]


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
        key = tuple([one.key for one in passes]), tuple(mine), task
        self.signature = program.signatures.get(key, lambda: Known(passes, mine))
        self.known: Known = self.signature.known

    def run(self, weight: Tensor) -> Results:
        """Loss, adversarial, penalty, consistency; the leaves' gradients; those at the samples, where wanted."""
        known, task = self.known, self.task
        outsiders = [
            Outsider(one.nodes, frozenset(i for i, call in enumerate(plan.calls) if call.leaf)) if generic else None
            for one, plan, generic in zip(self.passes, known.plans, known.generic, strict=True)
        ]
        inputs: list[Tensor | None] = [weight, _number(1.0, weight)]
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
        self._native: Any = None
        self._tags: dict[Any, int] = {}
        self._count = count()

    def run(self, passes: Sequence[Pass], task: Task, weight: Tensor) -> Results | bytes | None:
        """The results, or the key under which to ``keep`` a program; None where C++ has no say."""
        if backends.program is None or backends.forced() is not None or is_compiling():
            return None
        key = task, tuple([(one.groups, one.each, one.wants) for one in passes])
        tag = self._tags.get(key)
        if tag is None:
            if len(self._tags) >= program.CAPACITY:
                self._tags.clear()
            tag = self._tags[key] = next(self._count)
        found = self.native().run(
            [(one.outputs, one.x, one.start) for one in passes], tag, weight, _number(1.0, weight)
        )
        if type(found) is bytes:
            return found
        results, leaves = found
        return _sorted(results, leaves, [name for one in passes for name, _ in one.groups])

    def native(self) -> Any:
        if self._native is None:
            self._native = backends.program.Shelf(attributes(), program.CAPACITY)
        return self._native

    def leaves(self, outputs: list[Tensor], start: int) -> list[Tensor]:
        """The tensors at which a graph ends; for an older node's output one that can be joined to it."""
        return self.native().leaves(outputs, start)

    def keep(self, key: bytes, signature: program.Signature) -> None:
        known = signature.program
        if known is not None and len(known.parts) == 1 and known.parts[0].native is not None:
            self._native.add(key, known.parts[0].native)


shelf = _Shelf()


def run(passes: list[Pass], task: Task, weight: Tensor) -> Results:
    """loss, adversarial, penalty, consistency; the leaves' gradients; those at the groups' samples, where wanted."""
    found = shelf.run(passes, task, weight)
    if isinstance(found, tuple):
        return found
    with _passes(weight.device):
        signed = Signed(passes, task)
        results = signed.run(weight)
    if found is not None and signed.told:
        shelf.keep(found, signed.signature)
    return results


# --- what is traced ---------------------------------------------------------------------------------------------------


class _One:
    """A pass in the traced work."""

    def __init__(self, key: Any, plan: Plan, tensors: list[Tensor | None], passes: Passes) -> None:
        _, _, self.wants, self.groups, self.each, metas = key
        self.plan, self.passes = plan, passes
        self.scores, self.features = tensors[0], tensors[1] if len(metas) > 1 else None
        places = iter(plan.outputs)
        self.places = [next(places) if meta[4] else None for meta in metas]

    def rows(self, x: Tensor, name: str) -> Tensor:
        """A group's part of scores or features."""
        if len(self.groups) == 1:
            return x
        at = [n for n, _ in self.groups].index(name)
        return x.narrow(0, at * self.each, self.each)


def work(known: Known, task: Task, tensors: Sequence[Tensor | None], outsider: program.Outsider) -> list[Tensor | None]:
    """Values, then gradients of leaves and of samples: all that depends on the signature and the tensors alone."""
    weight, unit, *_ = tensors
    at, ones = 2, []
    assert weight is not None
    assert unit is not None
    for k, (key, plan) in enumerate(zip(known.keys, known.plans, strict=True)):
        given, saved = len(key[5]), plan.saved_count
        outputs = list(tensors[at : at + given])
        call = lambda what, u, k=k: outsider((k, *what), u)  # noqa: E731
        ones.append(_One(key, plan, outputs, Passes(plan, tensors[at + given : at + given + saved], call)))
        at += given + saved
    wide = accumulation_dtype(ones[0].scores.dtype)  # type: ignore[union-attr]
    own, term, seeds = _heads(ones, task, wide, unit)
    value: Tensor | None = None
    at_samples: list[Tensor | None] = []
    for one in ones:
        penalty, gradients = _one_pass(one, task, weight, {p: u for p, u in seeds.items() if p[0] is one})
        value = penalty if penalty is not None else value
        at_samples += gradients
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
    """The adversarial loss, the consistency term, and the cotangents of scores and features by their group."""
    if task.adversarial is None:
        return None, None, {}
    kinds = {"real": task.adversarial.real, "fake": task.adversarial.fake}
    scored = [(one, name) for one in ones for name, _ in one.groups if name in kinds]
    seeds: Seeds = {}
    loss = None
    if scored:
        scores = [one.rows(one.scores, name) for one, name in scored]  # type: ignore[arg-type]
        chosen = [kinds[name] for _, name in scored]
        loss = ops.score_loss(scores, chosen)
        if task.gradients:
            seeds = dict(zip(scored, ops.score_loss_backward(unit.to(wide), scores, chosen), strict=True))
    if task.consistency is None or not any(name == "again" for one in ones for name, _ in one.groups):
        return loss, None, seeds
    return loss, _consistency(ones, task, wide, seeds), seeds


def _consistency(ones: list[_One], task: Task, wide: torch.dtype, seeds: Seeds) -> Tensor:
    """CT-GAN's term; its cotangents are added."""
    options = task.consistency
    assert options is not None
    at = {name: one for one in ones for name, _ in one.groups}
    names = "real", "again"
    scores = [at[n].rows(at[n].scores, n) for n in names]  # type: ignore[arg-type]
    features = [at[n].rows(at[n].features, n) if at[n].features is not None else None for n in names]  # type: ignore[arg-type]
    pair = [scores[i].new_empty(len(scores[i]), 0) if f is None else f for i, f in enumerate(features)]
    tensors = [x.to(wide) for x in (*scores, *pair)]
    term, *coefficients = ops.consistency_term(*tensors, options.margin, options.feature_weight)
    if not task.gradients:
        return term
    cotangent = torch.full((), options.weight, dtype=wide, device=term.device)
    grads = ops.consistency_backward(cotangent, *tensors, *coefficients, features[0] is not None)
    for i, name in enumerate(names):
        known = seeds.get((at[name], name))
        own = grads[i].to(scores[i].dtype)
        seeds[at[name], name] = own if known is None else known + own
        feature = features[i]
        if feature is not None:
            seeds[at[name], f"features of {name}"] = grads[2 + i].to(feature.dtype)
    return term


def _one_pass(one: _One, task: Task, weight: Tensor, seeds: Seeds) -> tuple[Tensor | None, list[Tensor | None]]:
    """The penalty of a pass, if it has one, and its groups' gradients at the samples where these are wanted."""
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
    if top is not None:
        cotangents[top] = parts[0] if len(parts) == 1 else torch.cat(parts)
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
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            cotangents[at_features] = cotangents[at_features] + joined if at_features in cotangents else joined
    if penalised is None and not (task.gradients and cotangents):
        return None, nothing
    gradient = one.passes.pull(cotangents)
    if penalised is None:
        return None, [None if gradient is None or not one.wants else one.rows(gradient, n) for n, _ in one.groups]
    meta = one.plan.x_meta
    if gradient is None:
        gradient = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
    at_points = gradient if len(gradient) == one.each else gradient.narrow(0, one.plan.plain, one.each)
    rows = at_points.reshape(-1, at_points.shape[-1]) if task.by_point else at_points
    value, coefficient = ops.gradient_norm_penalty(rows, task.target, task.one_sided, REDUCTIONS["mean"])
    if task.gradients:
        direction = ops.gradient_norm_penalty_backward(weight.to(value.dtype), rows, coefficient)
        one.passes.push(direction.reshape(at_points.shape))
        scale = _scale(one, task, own, top)
        one.passes.bend({} if scale is not None else own, scale)
    if not one.wants:
        return value, nothing
    return value, [None if is_so else one.rows(gradient, name) for name, is_so in one.groups]


def _scale(one: _One, task: Task, own: dict[Place, Tensor], top: Place | None) -> Tensor | None:
    """Of penalised rows that are scored: one factor a row, where the scores' cotangents are multiples of ones."""
    if list(own) != [top] or top is None or one.plan.layouts is None or one.plan.curved:
        return None
    seed = own[top]
    linear = task.adversarial is not None and task.adversarial.linear and task.consistency is None
    if not (linear or seed.numel() == one.each):
        return None
    return seed.reshape(one.each, -1)[:, 0]


def _gradients(known: Known, ones: list[_One]) -> list[Tensor | None]:
    """Of every leaf; zeros where PyTorch has zeros, None where it has None."""
    parts: list[list[Any]] = [[] for _ in range(known.count)]
    blank: dict[int, Meta] = {}
    for one, numbers in zip(ones, known.leaves, strict=True):
        for k, more in one.passes.leaves().items():
            parts[numbers[k]] += more
        for k, meta in one.plan.reached():
            blank[numbers[k]] = meta
    gradients: list[Tensor | None] = []
    for number, found in enumerate(parts):
        if number in known.x or not (found or number in blank):
            gradients.append(None)
        elif found:
            gradients.append(total(found))
        else:
            zeros = blank[number]
            gradients.append(torch.zeros(zeros.shape, dtype=zeros.dtype, device=zeros.device))
    return gradients


def _apart(results: list[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Results that share no memory with each other or an input: they are scaled in place, and are the user's."""
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


def _passes(device: torch.device) -> Any:
    """The passes choose their own dtypes."""
    return torch.autocast(device.type, enabled=False) if autocasts(device.type) else nullcontext()


# --- penalties and steps ----------------------------------------------------------------------------------------------


def penalty_on_gradient(
    critic: Any,
    points: Tensor | Between,
    target: float,
    one_sided: bool,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    by_point: bool = False,
) -> Tensor:
    """Mean (|grad| - target)^2 of the summed scores at the points, weight gradients included.

    by_point: the norm is over the last axis alone.
    """
    points = points_of(points)
    wanted = torch.is_grad_enabled()
    task = Task(None, target, one_sided, by_point, None, wanted)
    with torch.no_grad():
        passes = [Pass(critic, [Group("points", points, True)], False, args, kwargs, by_point)]
        (_, _, value, _), found, _ = run(passes, task, _number(1.0, points))
    return deliver(value, found) if wanted else value


def _number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor, which nobody writes to."""
    return _scalar(value, accumulation_dtype(like.dtype), like.device)


@lru_cache(64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    known = device.type in ("cpu", "cuda") and not program.watched() and not torch.is_inference_mode_enabled()
    return (_constant if known else _constant.__wrapped__)(value, dtype, device)


def critic_step(
    critic: Any,
    real: Tensor,
    fake: Tensor,
    points: Tensor | Between | None,
    adversarial: Adversarial,
    penalty: Penalty | None,
    consistency: Consistency | None,
    together: bool | None = False,
    seen: Seen | None = None,
) -> Parts:
    """All parts of a critic's loss.

    points: where the gradient is penalised; the very tensor ``real`` or ``fake`` shares its pass with the scores.
    together: whether all samples go through the critic as one batch; None: if that was ``seen`` to be the same.
    """
    wanted = torch.is_grad_enabled()
    wants = wanted and (real.requires_grad or fake.requires_grad)
    shared = points if points is real or points is fake else None
    if shared is not None and (wants or _changes_in_passes(critic)):  # then two passes are not one
        points, shared = points.detach(), None  # type: ignore[union-attr]
    points = None if points is None else points_of(points)
    groups = [Group("fake", fake, fake is shared), Group("real", real, real is shared)]
    if consistency is not None:
        groups.append(Group("again", real, False))
    if points is not None and shared is None:
        groups.append(Group("points", points, True))
    target, one_sided = (penalty.target, penalty.one_sided) if penalty is not None else (0.0, False)
    task = Task(adversarial, target, one_sided, False, consistency, wanted)
    weight = _number(0.0 if penalty is None else penalty.weight, real)
    with torch.no_grad():
        done = None
        if points is not None and (together or (together is None and seen is not None)):
            done = _as_one(critic, groups, task, weight, wants, seen if together is None else None)
        if done is None:
            done = _one_by_one(critic, groups, task, weight, wants, seen if together is None else None)
        values, gradients, inputs = done
        loss, own, value, term = (torch.zeros_like(weight) if x is None else x for x in values)
    if wanted:
        loss = deliver(loss, [*gradients, *_merged(inputs, real, fake)])
    return Parts(loss, own, value, term)


def _as_one(
    critic: Any, groups: list[Group], task: Task, weight: Tensor, wants: bool, seen: Seen | None
) -> Results | None:
    """All groups as one batch, by force or, with ``seen``, where nothing is known against it; None where there is."""
    mode = None if seen is None else seen.mode(critic, groups[0].x)
    log = None if seen is None else seen.get(mode)
    if seen is not None and not isinstance(log, list):
        return None
    ordered = sorted(groups, key=lambda group: group.penalised)
    n = len(groups[0].x)
    check = None if log is None else Check(log, n, n * len(groups))
    try:
        one = Pass(critic, ordered, wants, looks_on=check)
    except Differs:
        one = None
    except Exception:
        if seen is None:
            raise
        one = None  # it may be the larger batch that it cannot take; if not, it raises again
    if seen is not None and (one is None or (check is not None and not check.done())):
        seen.set(mode, None)
        return None
    assert one is not None
    passes = [one]
    found = shelf.run(passes, task, weight)
    if isinstance(found, tuple):
        return found
    with _passes(weight.device):
        signed = Signed(passes, task)
        plan = signed.known.plans[0]
        why = (
            keeps_apart(plan, plan.outputs[0][0])
            if one.x_leaf is not None
            else "nothing in the graph tells its samples"
        )
        if why is not None:
            if seen is None:
                raise ValueError(
                    f"together: expected a critic in which samples do not meet, got one in which they do: {why}"
                )
            seen.set(mode, None)
            return None
        results = signed.run(weight)
    if found is not None and signed.told:
        shelf.keep(found, signed.signature)
    return results


def _one_by_one(
    critic: Any, groups: list[Group], task: Task, weight: Tensor, wants: bool, seen: Seen | None
) -> Results:
    """Each group as a batch of its own, in the order fake, real, points."""
    sums: list[Any] = [None] * 4
    found: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: list[tuple[str, Tensor]] = []
    passes: list[Pass] = []
    tied = task.consistency is not None
    to_note: tuple[Any, Watch | None, Pass] | None = None
    for group in groups:
        mode, watch = _to_see(critic, group, seen)
        passes.append(Pass(critic, [group], wants and not group.penalised, looks_on=watch))
        if mode is not None:
            to_note = mode, watch, passes[-1]
        if group is not groups[-1] and (tied or passes[0].x.nbytes < SMALL):
            continue
        if to_note is not None:
            with _passes(weight.device):
                signed = Signed(passes, task)
                _note(seen, *to_note, signed.known.plans[passes.index(to_note[2])])
                to_note = None
                values, gradients, at_samples = signed.run(weight)
        else:
            values, gradients, at_samples = run(passes, task, weight)
        passes = []
        sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, values, strict=True)]
        for leaf, g in gradients:
            known = found.get(id(leaf))
            found[id(leaf)] = leaf, g if known is None else known[1].add_(g)
        inputs += at_samples
    return sums, list(found.values()), inputs


def _to_see(critic: Any, group: Group, seen: Seen | None) -> tuple[Any, Watch | None]:
    """The mode that something is to be learnt of, and who looks on."""
    if seen is None or not group.penalised:
        return None, None
    mode = seen.mode(critic, group.x)
    what = seen.get(mode)
    return (mode, Watch()) if what == "looked" else (mode, None) if what == "new" else (None, None)


def _note(seen: Seen | None, mode: Any, watch: Watch | None, one: Pass, plan: Plan) -> None:
    """Remember what was seen of the penalised samples' pass."""
    assert seen is not None
    size = sum(x.nbytes for x in one.saved if x is not None)
    if keeps_apart(plan, plan.outputs[0][0]) is not None or size > LARGE[mode[2] == "cpu"]:
        seen.set(mode, None)
    else:
        seen.set(mode, "looked" if watch is None else settled(watch, plan, one.nodes))


SMALL = 1 << 16  # bytes of a batch: the passes over smaller ones are gone through at once
LARGE = {
    True: 1 << 22,
    False: 1 << 28,
}  # bytes of activations of one group: above, on the CPU or not, one batch gains nothing


def _merged(inputs: Sequence[tuple[str, Tensor]], real: Tensor, fake: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The gradients at the real batch, from one or two passes, and at the fake one, where they are wanted."""
    found = []
    for x, names in ((real, ("real", "again")), (fake, ("fake",))):
        own = [g for name, g in inputs if name in names]
        if own and x.requires_grad:
            found.append((x, sum(own[1:], own[0]).to(x.dtype)))
    return found


def _changes_in_passes(critic: Any) -> bool:
    """Whether a pass may leave the critic changed, as spectral norm's does: it has buffers and trains."""
    return isinstance(critic, nn.Module) and critic.training and any(True for _ in critic.buffers())
