"""A critic's penalty or whole loss with its weight gradients, computed in the forward call.

The critic is called as its author wrote it; the passes traverse autograd's graph of that call once, and nothing is
differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpkernels import backends
from gpkernels.critic.by_autograd import left_to_autograd, losses, penalties_of
from gpkernels.critic.call import Group, call, call_each_group, refuse_symbols, refuse_tangents
from gpkernels.critic.deliver import deliver
from gpkernels.critic.parts import Between, CriticLossParts, Task, points_of
from gpkernels.critic.run import LOSS, NOTHING, PENALTY, VALUES, How, Results, Signed, made, numbers_of, run, shelf
from gpkernels.critic.settled import PLACES, Settled, Way, record_of
from gpkernels.critic.together import Differs, Log, Record, Seen, Watch, keeps_apart, settled

_ALONE = (1.0,)  # weight of a penalty by itself


class Begun(NamedTuple):
    """What C++ could not finish. before, key: what came of the critic's calls, apart or as one batch."""

    as_one: bool
    before: Sequence[Any]
    key: bytes | None


def penalty_at_once(
    critic: Any,
    points: Tensor | Between,
    task: Task,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    keep: Callable[[Way], None] | None = None,
) -> Tensor | Begun | None:
    """Compute ``penalty_on_gradient`` in C++; None where the native path does not apply, or refuses the tensors.

    keep: called with how a penalty was made.
    """
    batch = points if isinstance(points, Tensor) else points.real
    if not task.gradients or not isinstance(batch, Tensor):
        return None
    how, left = _how_of_a_penalty(task), left_to_autograd.has(critic, batch)
    given = None, None, points if isinstance(points, Tensor) else tuple(points)
    more = tuple(args), dict(kwargs or {})
    if left:
        found = shelf.by_autograd(critic, given, how, _ALONE, *more)
    else:
        found = shelf.step(critic, given, how, _ALONE, None, *more)
    if isinstance(found, tuple):
        return Begun(False, *found)
    if found is not None and keep is not None:
        keep(Way(how, _ALONE, left))
    return found


def penalty_on_gradient(
    critic: Any,
    points: Tensor | Between,
    task: Task,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    begun: Begun | None = None,
    keep: Callable[[Way], None] | None = None,
) -> Tensor:
    """Compute the penalty on the gradients of the summed scores at the points, weight gradients included.

    begun: what was left of a penalty that began in C++. keep: as in ``penalty_at_once``.
    """
    found = penalty_at_once(critic, points, task, args, kwargs, keep) if begun is None else begun
    if isinstance(found, Tensor):
        return found
    refuse_tangents([points])
    refuse_symbols(points if isinstance(points, Tensor) else points.real)
    before, key = ((), None) if found is None else (found.before, found.key)
    groups = [Group("points", points, True)]
    if task.gradients and left_to_autograd.has(critic, points if isinstance(points, Tensor) else points.real):
        (one,) = call_each_group(critic, groups, tuple(args), kwargs, task.pack, before)
        ((_, value),) = penalties_of(one, task)
        return value
    with torch.no_grad():
        passes = made(critic, [groups], task, args=args, kwargs=kwargs, before=before)
        values, gradients, _ = run(passes, task, numbers_of(_ALONE, groups[0].batch), key)
        value = values[PENALTY]
    return deliver(value, gradients) if task.gradients else value


@lru_cache(64)
def _how_of_a_penalty(task: Task) -> How:
    return How(task, ((("points", True),),))


class Batches(NamedTuple):
    """Arguments of a step. points: where penalties with points of their own are taken."""

    real: Tensor
    fake: Tensor
    points: Mapping[str, Tensor | Between]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = NOTHING

    @property
    def joinable(self) -> bool:
        """Whether all samples could be one batch: the shapes are equal, and there are no further inputs."""
        return self.real.shape == self.fake.shape and not self.has_more

    @property
    def has_more(self) -> bool:
        """Whether the critic has further inputs."""
        return len(self.args) + len(self.kwargs) > 0  # Dynamo does not trace ``not`` of a tuple with tensors

    def check_one_batch(self, task: Task) -> None:
        """Raise ValueError where ``together=True`` asks for one batch of what cannot be one."""
        if task.penalties and not self.joinable:
            got = "further inputs" if self.has_more else "batches of different sizes"
            raise ValueError(f"together: expected None or False with {got}, got True")


def step_at_once(
    critic: Any,
    given: Batches,
    task: Task,
    weights: tuple[float, ...],
    together: bool | None,
    seen: Seen,
    options: Sequence[Any] | None = None,
    make: Callable[[Tensor], Tensor] | None = None,
) -> CriticLossParts | Begun | None:
    """Run ``critic_step`` in C++; None where that path does not apply or rejects the tensors.

    options, make: as in ``record_of``, for the next step, which ``step_again`` makes; without options it is not known
    what decided.
    """
    real, fake = given.real, given.fake
    if not (isinstance(real, Tensor) and isinstance(fake, Tensor)) or real.requires_grad or fake.requires_grad:
        return None
    apart, joint = _hows(task)
    mode, as_one, tensors = None, False, _tensors_of(given, task)
    if not together and task.gradients and left_to_autograd.has(critic, real):
        way = Way(apart, weights, True)
        found = shelf.by_autograd(critic, tensors, apart, weights, given.args, given.kwargs)
    else:
        may = bool(task.penalties) and given.joinable
        mode = seen.mode(critic, real) if together is None and may else None
        known = None if mode is None else seen.get(mode)
        as_one = may and (bool(together) or isinstance(known, Log))
        if not as_one and (known in ("new", "looked") or not _go_at_once(real, task)):
            return None
        log = known if isinstance(known, Log) else None
        way = Way(joint if as_one else apart, weights, False, log, 0 if as_one or _retains_all(task) else SMALL)
        try:
            found = shelf.step(critic, tensors, way.how, weights, log, given.args, given.kwargs)
        except (Differs, Exception):
            if mode is None or not as_one:
                raise
            seen.set(mode, None)  # the larger batch may be the cause; otherwise the error is raised again
            return None
    if found is None:
        return None
    if len(found) == 2:  # fewer than values
        return Begun(as_one, *found)
    if options is not None:
        places = [PLACES[name] for name, _ in task.penalties]
        made = record_of(critic, real, fake, options, given.has_more, way, places, make)
        seen.last = None if made is None else Settled(made, task, weights, as_one, mode, left_to_autograd.changes)
    return _parts(found, task)


def step_again(
    seen: Seen,
    critic: Any,
    options: tuple[Any, ...],
    real: Any,
    fake: Any,
    eps: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> CriticLossParts | tuple[Batches, Task, tuple[float, ...], Begun | None] | None:
    """Make a step as the last one.

    Returns the result; or what is left to do: arguments of ``critic_step``, whose points were drawn; or None, before
    anything is drawn or called, where something differs.
    """
    last: Settled | None = seen.last
    if last is None or backends.program is None or last.changes != left_to_autograd.changes:
        return None
    found = last.native.again(critic, options, real, fake, eps, args, kwargs)
    if found is None or isinstance(found, CriticLossParts):
        return found
    drawn, before, key = found
    points = {name: x for (name, _), x in zip(last.task.penalties, drawn, strict=True) if x is not None}
    if "wgan-gp" in points:
        points["wgan-gp"] = Between(real, fake, points["wgan-gp"])
    if before is None:
        seen.set(last.mode, None)  # the larger batch may be the cause; otherwise the error is raised again
    begun = None if before is None else Begun(last.as_one, before, key)
    given = Batches(real, fake, points, tuple(args), dict(kwargs or {}))
    return given, last.task, last.weights, begun


def _tensors_of(given: Batches, task: Task) -> tuple[Any, ...]:
    """Return what C++ makes the batches of."""
    shares = task.shares
    return given.fake, given.real, *[_place_of(name, given, shares) for name, _ in task.penalties]


def critic_step(
    critic: Any,
    given: Batches,
    task: Task,
    weights: Sequence[float],
    together: bool | None,
    seen: Seen,
    begun: Begun | None = None,
) -> CriticLossParts:
    """Compute all parts of a critic's loss.

    together: whether all samples are processed as one batch; None: where ``seen`` found that equivalent. begun: the
    part of the step that is already done.
    """
    real, fake = given.real, given.fake
    refuse_tangents([real, fake, *given.points.values()])
    refuse_symbols(real)
    # What C++ begins requires no gradients at the samples, unless the critic called ``requires_grad_`` on them.
    wants = begun is None and task.gradients and (real.requires_grad or fake.requires_grad)
    groups = groups_of(given, task, wants)
    if task.gradients and not (wants or together) and left_to_autograd.has(critic, real):
        before = () if begun is None else begun.before
        called = call_each_group(critic, groups, given.args, given.kwargs, task.pack, before)
        loss, *parts = losses(called, task, weights)
        assert loss is not None
        return _parts([loss, *(None if x is None else x.detach().clone() for x in parts)], task)
    if together:
        given.check_one_batch(task)
    numbers, own = numbers_of(weights, real), seen if together is None and given.joinable else None
    with torch.no_grad():
        done = None
        if task.penalties and (together or own is not None) and (begun is None or begun.as_one):
            done = _as_one(critic, groups, task, numbers, wants, own, begun)
        if done is None:
            made_before = None if begun is None or begun.as_one else begun
            done = _one_by_one(critic, groups, task, numbers, wants, own, made_before, given)
        values, gradients, inputs = done
    if task.gradients:
        values[LOSS] = deliver(values[LOSS], [*gradients, *_merged(inputs, real, fake)])
    return _parts(values, task)


def _parts(values: Sequence[Tensor | None], task: Task) -> CriticLossParts:
    """Convert the values of a step to parts, with zeros for those that were not requested."""
    loss = values[LOSS]
    assert loss is not None
    own, term, *penalties = [loss.new_zeros(()) if x is None else x for x in values[1:]]
    return CriticLossParts(loss, own, named(penalties, task, loss), term)


def named(penalties: Sequence[Tensor], task: Task, like: Tensor) -> Any:
    """Return penalties as in ``CriticLossParts``: by name where there may be several, zero for none."""
    if task.several:
        return {name: value for (name, _), value in zip(task.penalties, penalties, strict=True)}
    return penalties[0] if penalties else like.new_zeros(())


def groups_of(given: Batches, task: Task, wants: bool) -> list[Group]:
    """Return the groups of the critic's calls, in the usual order. wants: whether scored samples require gradients."""
    shares = () if wants else task.shares
    groups = [Group("fake", given.fake, "r2" in shares), Group("real", given.real, "r1" in shares)]
    if task.consistency is not None:
        groups.append(Group("again", given.real, False))
    for name, _ in task.penalties:
        x = _place_of(name, given, shares)
        if x is not None:
            groups.append(Group(name, x if isinstance(x, Between) else x.detach(), True))
    return groups


def _place_of(name: str, given: Batches, shares: Sequence[str]) -> Any:
    """Return the points of a penalty, or None where it shares the pass of the scored samples."""
    if name in shares:
        return None
    return given.real if name == "r1" else given.fake if name == "r2" else given.points[name]


@lru_cache(64)
def _hows(task: Task) -> tuple[How, How]:
    """Describe the calls of separate groups in the usual order, and of one batch."""
    groups = [("fake", "r2" in task.shares), ("real", "r1" in task.shares)]
    if task.consistency is not None:
        groups.append(("again", False))
    groups += [(name, True) for name, _ in task.penalties if name not in task.shares]
    apart = How(task, tuple([(group,) for group in groups]))
    return apart, How(task, (tuple(sorted(groups, key=lambda group: group[1])),))


def _go_at_once(batch: Tensor, task: Task) -> bool:
    """Whether all graphs are retained until the last call is made."""
    return _retains_all(task) or batch.nbytes < SMALL


def _retains_all(task: Task) -> bool:
    """Whether a value depends on several calls."""
    return task.consistency is not None or (task.adversarial is not None and task.adversarial.paired)


def _as_one(
    critic: Any,
    groups: list[Group],
    task: Task,
    numbers: Sequence[Tensor],
    wants: bool,
    seen: Seen | None,
    begun: Begun | None,
) -> Results | None:
    """Process all groups as one batch; None where that is not equivalent.

    Without ``seen`` the batch is forced.
    """
    mode = None if seen is None else seen.mode(critic, groups[0].batch)
    log = None if seen is None else seen.get(mode)
    if seen is not None and not isinstance(log, Log):
        return None
    ordered = sorted(groups, key=lambda group: group.penalised)

    def look(signed: Signed) -> None:
        why = _why_apart(signed)
        if why is not None and seen is None:
            raise ValueError(
                f"together: expected a critic whose samples are independent, got one in which they interact: {why}"
            )
        if why is not None:
            raise Differs

    before, key = ((), None) if begun is None else (begun.before, begun.key)
    try:
        passes = made(critic, [ordered], task, wants, log, before=before)
    except (Differs, Exception):
        if seen is None:
            raise
        passes = []  # the larger batch may be the cause; otherwise the error is raised again
    if passes:
        with suppress(Differs):
            return run(passes, task, numbers, key, look)
    assert seen is not None
    seen.set(mode, None)
    return None


def _why_apart(signed: Signed) -> str | None:
    """Return why samples of one batch interact, or None."""
    if signed.passes[0].x_leaf is None:
        return "the scores do not depend on the batch"
    if signed.unfolded:  # a checkpoint has no graph where its inputs require no gradients
        return "checkpoints with use_reentrant=True"
    plan = signed.known.plans[0]
    return keeps_apart(plan, plan.outputs[0][0])


def _one_by_one(
    critic: Any,
    groups: list[Group],
    task: Task,
    numbers: Sequence[Tensor],
    wants: bool,
    seen: Seen | None,
    begun: Begun | None,
    given: Batches,
) -> Results:
    """Process each group as a batch of its own, in the order fake, real, points."""
    at_once = _go_at_once(groups[0].batch, task)
    mode, watch = _to_see(critic, groups, seen)
    records: list[Record] = []
    if begun is not None:
        more = given.args, given.kwargs
        passes = made(critic, [[group] for group in groups], task, wants, None, *more, begun.before)
        return run(passes, task, numbers, begun.key)
    groups = [group._replace(x=points_of(group.x)) for group in groups]  # before the critic may change its arguments
    sums: list[Any] = [None] * (len(VALUES) + len(task.penalties))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: list[tuple[str, Tensor]] = []
    passes = []
    teacher = next((group for group in groups if group.penalised), None)  # its pass shows whether samples interact
    for group in groups:
        asks, on = wants and not group.penalised, None
        if watch is not None:
            on = watch if group is teacher else Record(critic)
            records.append(on)
        passes.append(call(critic, [group], asks, given.args, given.kwargs, task.pack, on))
        if group is not groups[-1] and at_once:
            continue
        note = None
        if mode is not None and teacher is not None and any((teacher.name, True) in one.groups for one in passes):
            note = lambda signed: _note(seen, mode, watch, signed)  # noqa: E731
        values, gradients, at_samples = run(passes, task, numbers, look=note)
        passes = []
        sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, values, strict=True)]
        for leaf, g in gradients:
            known = found.get(id(leaf))
            found[id(leaf)] = leaf, g if known is None else known[1].add_(g)
        inputs += at_samples
    if seen is not None and not all(record.reason is None and record.log == records[0].log for record in records):
        seen.set(mode, None)
    return sums, list(found.values()), inputs


def _to_see(critic: Any, groups: list[Group], seen: Seen | None) -> tuple[Any, Watch | None]:
    """Return the mode to learn about, and the ``Watch`` for the penalised call."""
    if seen is None or not any(group.penalised for group in groups):
        return None, None
    mode = seen.mode(critic, groups[0].batch)
    what = seen.get(mode)
    return (mode, Watch(critic)) if what == "looked" else (mode, None) if what == "new" else (None, None)


def _note(seen: Seen | None, mode: Any, watch: Watch | None, signed: Signed) -> None:
    """Store what the penalised samples' pass showed."""
    assert seen is not None
    at = next(i for i, one in enumerate(signed.passes) if any(penalised for _, penalised in one.groups))
    one, plan = signed.passes[at], signed.known.plans[at]
    size = sum(x.nbytes for x in one.saved if x is not None)
    apart = one.unfolded or keeps_apart(plan, plan.outputs[0][0]) is not None
    if apart or size > LARGE[mode[2] == "cpu"]:
        seen.set(mode, None)
    else:
        seen.set(mode, "looked" if watch is None else settled(watch, plan, one.nodes))


SMALL = 1 << 16  # bytes of a batch below which all graphs are retained until the last call
LARGE = {
    True: 1 << 22,
    False: 1 << 28,
}  # bytes of activations per group, on CPU or not, above which one batch does not pay


def _merged(inputs: Sequence[tuple[str, Tensor]], real: Tensor, fake: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Sum the gradients at the real batch, from one or two passes, and at the fake batch, where wanted."""
    found = []
    for x, names in ((real, ("real", "again")), (fake, ("fake",))):
        own = [g for name, g in inputs if name in names]
        if own and x.requires_grad:
            found.append((x, sum(own[1:], own[0]).to(x.dtype)))
    return found
