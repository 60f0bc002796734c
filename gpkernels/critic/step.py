"""A critic's penalty or whole loss with its weight gradients, computed together in the forward call.

The critic is called as it is; what autograd then knows of the call is gone through once, in the order that wastes
nothing, and nothing is ever differentiated twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.critic.call import Group, call
from gpkernels.critic.deliver import deliver
from gpkernels.critic.parts import Adversarial, Between, Consistency, Parts, Penalty, Task, points_of
from gpkernels.critic.run import Results, Signed, number, run, step
from gpkernels.critic.together import Differs, Log, Seen, Watch, keeps_apart, settled


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
    wanted = torch.is_grad_enabled()
    task = Task(None, target, one_sided, by_point, None, wanted)
    weight = number(1.0, points.real if isinstance(points, Between) else points)
    with torch.no_grad():
        done, passes, key = step(critic, [[Group("points", points, True)]], task, weight, args=args, kwargs=kwargs)
        (_, _, value, _), found, _ = run(passes, task, weight, key) if done is None else done
    return deliver(value, found) if wanted else value


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
    groups = [Group("fake", fake, fake is shared), Group("real", real, real is shared)]
    if consistency is not None:
        groups.append(Group("again", real, False))
    if points is not None and shared is None:
        groups.append(Group("points", points, True))
    target, one_sided = (penalty.target, penalty.one_sided) if penalty is not None else (0.0, False)
    task = Task(adversarial, target, one_sided, False, consistency, wanted)
    weight = number(0.0 if penalty is None else penalty.weight, real)
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

    try:
        done, passes, key = step(critic, [ordered], task, weight, wants, log)
        if done is not None:
            return done
    except Differs:
        passes = []
    except Exception:
        if seen is None:
            raise
        passes = []  # it may be the larger batch that it cannot take; if not, it raises again
    if passes:
        try:
            return run(passes, task, weight, key, look)
        except Differs:
            pass
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
    critic: Any, groups: list[Group], task: Task, weight: Tensor, wants: bool, seen: Seen | None
) -> Results:
    """Each group as a batch of its own, in the order fake, real, points."""
    at_once = task.consistency is not None or groups[0].batch.nbytes < SMALL
    mode, watch = _to_see(critic, groups, seen)
    if at_once and mode is None:
        done, passes, key = step(critic, [[group] for group in groups], task, weight, wants)
        return run(passes, task, weight, key) if done is None else done
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
