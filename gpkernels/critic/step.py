"""A critic's penalty or whole loss with its weight gradients, computed together in the forward call.

The critic is called as it is; what autograd then knows of the call is gone through once, in the order that wastes
nothing, and nothing is ever differentiated twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpkernels.critic.by_autograd import losses, penalty_of, plainly
from gpkernels.critic.call import Group, call, call_plainly
from gpkernels.critic.deliver import deliver
from gpkernels.critic.parts import Between, CriticLossParts, Task, points_of
from gpkernels.critic.run import How, Results, Signed, made, number, run, shelf
from gpkernels.critic.together import Differs, Log, Seen, Watch, keeps_apart, settled


class Begun(NamedTuple):
    """What C++ could not finish. before, key: what came of the critic's calls, apart or as one batch."""

    as_one: bool
    before: Sequence[Any]
    key: bytes | None


def penalty_at_once(
    critic: Any,
    points: Tensor | Between,
    target: float,
    one_sided: bool,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    by_point: bool = False,
) -> Tensor | Begun | None:
    """``penalty_on_gradient`` in C++, if that knows how to and finds nothing wrong with the tensors; None otherwise."""
    batch = points if isinstance(points, Tensor) else points.real
    if not torch.is_grad_enabled() or not isinstance(batch, Tensor):
        return None
    how = _how_of_a_penalty(target, one_sided, by_point)
    given = None, None, points if isinstance(points, Tensor) else tuple(points)
    more = tuple(args), dict(kwargs or {})
    if plainly.has(critic, batch):
        found = shelf.by_autograd(critic, given, how, 1.0, *more)
        return Begun(False, found, None) if isinstance(found, list) else found
    found = shelf.step(critic, given, how, 1.0, None, *more)
    return Begun(False, *found) if isinstance(found, tuple) else found


def penalty_on_gradient(
    critic: Any,
    points: Tensor | Between,
    target: float,
    one_sided: bool,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    by_point: bool = False,
    begun: Begun | None = None,
) -> Tensor:
    """Mean (|grad| - target)^2 of the summed scores at the points, weight gradients included.

    by_point: the norm is over the last axis alone. begun: what there is of it.
    """
    found = penalty_at_once(critic, points, target, one_sided, args, kwargs, by_point) if begun is None else begun
    if isinstance(found, Tensor):
        return found
    before, key = ((), None) if found is None else (found.before, found.key)
    wanted = torch.is_grad_enabled()
    task = Task(None, target, one_sided, by_point, None, wanted)
    groups = [Group("points", points, True)]
    if wanted and plainly.has(critic, points if isinstance(points, Tensor) else points.real):
        (one,) = call_plainly(critic, groups, tuple(args), kwargs, by_point, before)
        return penalty_of(one, task)
    with torch.no_grad():
        passes = made(critic, [groups], task, args=args, kwargs=kwargs, before=before)
        (_, _, value, _), gradients, _ = run(passes, task, number(1.0, groups[0].batch), key)
    return deliver(value, gradients) if wanted else value


@lru_cache(64)
def _how_of_a_penalty(target: float, one_sided: bool, by_point: bool) -> How:
    return How(Task(None, target, one_sided, by_point, None, True), ((("points", True),),))


def step_at_once(
    critic: Any,
    real: Any,
    fake: Any,
    points: Tensor | Between | None,
    task: Task,
    weight: float,
    together: bool | None,
    seen: Seen,
) -> CriticLossParts | Begun | None:
    """``critic_step`` in C++, if that knows how to and finds nothing wrong with the tensors; None otherwise."""
    if not (isinstance(real, Tensor) and isinstance(fake, Tensor)) or real.requires_grad or fake.requires_grad:
        return None
    shared = _shared(critic, real, fake, points)
    apart, joint = _hows(task, shared, points is not None)
    given = fake, real, tuple(points) if isinstance(points, Between) else None if shared else points
    if not together and task.gradients and plainly.has(critic, real):
        found = shelf.by_autograd(critic, given, apart, weight)
        if isinstance(found, list):
            return Begun(False, found, None)
        return None if found is None else CriticLossParts(*found)
    mode = seen.mode(critic, real) if together is None and points is not None else None
    known = None if mode is None else seen.get(mode)
    as_one = points is not None and (bool(together) or isinstance(known, Log))
    if not as_one and (known in ("new", "looked") or not _go_at_once(real, task)):
        return None
    try:
        log = known if isinstance(known, Log) else None
        found = shelf.step(critic, given, joint if as_one else apart, weight, log)
    except (Differs, Exception):
        if mode is None or not as_one:
            raise
        seen.set(mode, None)  # it may be the larger batch that it cannot take; if not, it raises again
        return None
    if found is None or len(found) == 4:
        return None if found is None else CriticLossParts(*found)
    return Begun(as_one, *found)


def critic_step(
    critic: Any,
    real: Tensor,
    fake: Tensor,
    points: Tensor | Between | None,
    task: Task,
    weight: float,
    together: bool | None,
    seen: Seen,
    begun: Begun | None = None,
) -> CriticLossParts:
    """All parts of a critic's loss.

    points: where the gradient is penalised; the very tensor ``real`` or ``fake`` shares its pass with the scores.
    together: whether all samples go through the critic as one batch; None: if that was ``seen`` to be the same.
    begun: what there is of it.
    """
    wants = task.gradients and (real.requires_grad or fake.requires_grad)
    groups = groups_of(critic, real, fake, points, task, wants)
    if task.gradients and not (wants or together) and plainly.has(critic, real):
        called = call_plainly(critic, groups, before=() if begun is None else begun.before)
        loss, *parts = losses(called, task, weight)
        blank = loss.detach()
        return CriticLossParts(loss, *(torch.zeros_like(blank) if x is None else x.detach().clone() for x in parts))
    factor, own = number(weight, real), seen if together is None else None
    with torch.no_grad():
        done = None
        if points is not None and (together or own is not None) and (begun is None or begun.as_one):
            done = _as_one(critic, groups, task, factor, wants, own, begun)
        if done is None:
            before = None if begun is None or begun.as_one else begun
            done = _one_by_one(critic, groups, task, factor, wants, own, before)
        values, gradients, inputs = done
        loss, adversarial, value, term = (torch.zeros_like(factor) if x is None else x for x in values)
    if task.gradients:
        loss = deliver(loss, [*gradients, *_merged(inputs, real, fake)])
    return CriticLossParts(loss, adversarial, value, term)


def groups_of(
    critic: Any, real: Tensor, fake: Tensor, points: Tensor | Between | None, task: Task, wants: bool
) -> list[Group]:
    """What the critic is called with, in the usual order. wants: whether samples that are scored have gradients."""
    shared = None if wants else _shared(critic, real, fake, points)
    groups = [Group("fake", fake, shared == "fake"), Group("real", real, shared == "real")]
    if task.consistency is not None:
        groups.append(Group("again", real, False))
    if points is not None and shared is None:
        groups.append(Group("points", points if isinstance(points, Between) else points.detach(), True))
    return groups


def _shared(critic: Any, real: Tensor, fake: Tensor, points: Any) -> str | None:
    """The group whose scores and penalty come of one pass: where the critic is as it was after it."""
    if (points is real or points is fake) and not _changes_in_passes(critic):
        return "real" if points is real else "fake"
    return None


@lru_cache(64)
def _hows(task: Task, shared: str | None, penalised: bool) -> tuple[How, How]:
    """One by one in the usual order, and as one batch."""
    names = ["fake", "real", *(["again"] if task.consistency is not None else [])]
    groups = [(name, name == shared) for name in names]
    if penalised and shared is None:
        groups.append(("points", True))
    apart = How(task, tuple([(group,) for group in groups]))
    return apart, How(task, (tuple(sorted(groups, key=lambda group: group[1])),))


def _go_at_once(batch: Tensor, task: Task) -> bool:
    """Whether all passes are kept until the last call is made."""
    return task.consistency is not None or batch.nbytes < SMALL


def _as_one(
    critic: Any,
    groups: list[Group],
    task: Task,
    weight: Tensor,
    wants: bool,
    seen: Seen | None,
    begun: Begun | None,
) -> Results | None:
    """All groups as one batch, by force or, with ``seen``, where nothing is known against it; None where there is."""
    mode = None if seen is None else seen.mode(critic, groups[0].batch)
    log = None if seen is None else seen.get(mode)
    if seen is not None and not isinstance(log, Log):
        return None
    ordered = sorted(groups, key=lambda group: group.penalised)

    def look(signed: Signed) -> None:
        why = _why_apart(signed)
        if why is not None and seen is None:
            raise ValueError(
                f"together: expected a critic in which samples do not meet, got one in which they do: {why}"
            )
        if why is not None:
            raise Differs

    before, key = ((), None) if begun is None else (begun.before, begun.key)
    try:
        passes = made(critic, [ordered], task, wants, log, before=before)
    except (Differs, Exception):
        if seen is None:
            raise
        passes = []  # it may be the larger batch that it cannot take; if not, it raises again
    if passes:
        with suppress(Differs):
            return run(passes, task, weight, key, look)
    assert seen is not None
    seen.set(mode, None)
    return None


def _why_apart(signed: Signed) -> str | None:
    """Why samples that went as one batch must not."""
    if signed.passes[0].x_leaf is None:
        return "nothing in the graph tells its samples"
    plan = signed.known.plans[0]
    return keeps_apart(plan, plan.outputs[0][0])


def _one_by_one(
    critic: Any,
    groups: list[Group],
    task: Task,
    weight: Tensor,
    wants: bool,
    seen: Seen | None,
    begun: Begun | None,
) -> Results:
    """Each group as a batch of its own, in the order fake, real, points."""
    at_once = _go_at_once(groups[0].batch, task)
    mode, watch = _to_see(critic, groups, seen)
    if begun is not None:
        passes = made(critic, [[group] for group in groups], task, wants, before=begun.before)
        return run(passes, task, weight, begun.key)
    if isinstance(groups[-1].x, Between):  # before the critic can change what it is called with
        groups = [*groups[:-1], groups[-1]._replace(x=points_of(groups[-1].x))]
    sums: list[Any] = [None] * 4
    found: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: list[tuple[str, Tensor]] = []
    passes = []
    for group in groups:
        learns = mode is not None and group.penalised
        passes.append(call(critic, [group], wants and not group.penalised, looks_on=watch if learns else None))
        if group is not groups[-1] and at_once:
            continue
        note = None
        if mode is not None and any(penalised for one in passes for _, penalised in one.groups):
            note = lambda signed: _note(seen, mode, watch, signed)  # noqa: E731
        values, gradients, at_samples = run(passes, task, weight, look=note)
        passes = []
        sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, values, strict=True)]
        for leaf, g in gradients:
            known = found.get(id(leaf))
            found[id(leaf)] = leaf, g if known is None else known[1].add_(g)
        inputs += at_samples
    return sums, list(found.values()), inputs


def _to_see(critic: Any, groups: list[Group], seen: Seen | None) -> tuple[Any, Watch | None]:
    """The mode that something is to be learnt of, and who looks on."""
    if seen is None or not any(group.penalised for group in groups):
        return None, None
    mode = seen.mode(critic, groups[0].batch)
    what = seen.get(mode)
    return (mode, Watch()) if what == "looked" else (mode, None) if what == "new" else (None, None)


def _note(seen: Seen | None, mode: Any, watch: Watch | None, signed: Signed) -> None:
    """Remember what was seen of the penalised samples' pass."""
    assert seen is not None
    at = next(i for i, one in enumerate(signed.passes) if any(penalised for _, penalised in one.groups))
    one, plan = signed.passes[at], signed.known.plans[at]
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
