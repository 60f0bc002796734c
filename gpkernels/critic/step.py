"""A critic's penalty or whole loss with its weight gradients, computed together in the forward call.

The critic is called as it is; what autograd then knows of the call is gone through once, in the order that wastes
nothing, and nothing is ever differentiated twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.critic.call import Group, Pass
from gpkernels.critic.deliver import deliver
from gpkernels.critic.parts import Adversarial, Between, Consistency, Parts, Penalty, Task, points_of
from gpkernels.critic.plan import Plan
from gpkernels.critic.run import Results, Signed, number, own_dtypes, run, shelf
from gpkernels.critic.together import Check, Differs, Seen, Watch, keeps_apart, settled


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
        (_, _, value, _), found, _ = run(passes, task, number(1.0, points))
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
    if shared is not None and (wants or _changes_inown_dtypes(critic)):  # then two passes are not one
        points, shared = points.detach(), None  # type: ignore[union-attr]
    points = None if points is None else points_of(points)
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
    with own_dtypes(weight.device):
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
            with own_dtypes(weight.device):
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


def _changes_inown_dtypes(critic: Any) -> bool:
    """Whether a pass may leave the critic changed, as spectral norm's does: it has buffers and trains."""
    return isinstance(critic, nn.Module) and critic.training and any(True for _ in critic.buffers())
