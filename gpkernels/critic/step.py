"""A critic's penalty or whole loss with its weight gradients, computed together in the forward call.

Real, fake and penalised samples go through the critic one after the other: it sees the batches that it would see in
PyTorch, and no more than one group's activations are held at a time. Nothing is ever differentiated twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpkernels import ops
from gpkernels.critic.deliver import deliver
from gpkernels.critic.mlp import native_layers, native_penalty, native_step
from gpkernels.critic.parts import Adversarial, Between, Consistency, Parts, Penalty, points_of
from gpkernels.critic.passes import add_curved_penalty_gradients, add_penalty_gradients, record_input_gradient
from gpkernels.critic.record import node_of_scores, record, scores_of
from gpkernels.critic.tape import Gradients, Node, NoRule, Tape, unwrapped
from gpkernels.reference import REDUCTIONS, accumulation_dtype


def _passes(device: torch.device) -> Any:
    """The passes choose their own dtypes."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def penalty_on_gradient(
    critic: Any,
    points: Tensor | Between,
    target: float,
    one_sided: bool,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    by_point: bool = False,
) -> Tensor:
    """Mean (|grad| - target)^2 of the summed scores at the points, weight gradients included; NoRule if it cannot be.

    by_point: the norm is over the last axis alone.
    """
    if not (args or kwargs or by_point):
        layers = native_layers(unwrapped(critic), points[0] if isinstance(points, Between) else points)
        if layers is not None:
            return native_penalty(layers, points, Penalty(1.0, target, one_sided))
    points = points_of(points).detach()
    tape, output = record(critic, points, args, kwargs)
    wanted = torch.is_grad_enabled() and tape.gradients.weights
    with torch.no_grad(), _passes(points.device):
        scores = scores_of(output)
        gradient = record_input_gradient(tape, {node_of_scores(tape, scores): torch.ones_like(scores)}, 0)
        if gradient is None:
            raise NoRule("the scores do not depend on the input")
        rows = gradient.reshape(-1, gradient.shape[-1]) if by_point else gradient
        value, coefficient = ops.gradient_norm_penalty(rows, target, one_sided, REDUCTIONS["mean"])
        if not wanted:
            return value
        direction = ops.gradient_norm_penalty_backward(torch.ones_like(value), rows, coefficient)
        direction = direction.reshape(gradient.shape)
        if tape.curved:
            add_curved_penalty_gradients(tape, direction, 0, {})
        else:
            add_penalty_gradients(tape, direction, 0, None)
    return deliver(value, tape.gradients.all())


def critic_step(
    critic: Any,
    real: Tensor,
    fake: Tensor,
    points: Tensor | Between | None,
    adversarial: Adversarial,
    penalty: Penalty | None,
    consistency: Consistency | None,
) -> Parts:
    """All parts of a critic's loss; NoRule where the critic cannot be recorded.

    points: where the gradient is penalised; the very tensor ``real`` or ``fake`` shares its pass with the scores.
    """
    differentiable = torch.is_grad_enabled()
    wants = differentiable and (real.requires_grad or fake.requires_grad)
    shared = points if points is real or points is fake else None
    if shared is not None and (wants or _changes_in_passes(critic)):  # then two passes are not one
        points, shared = points.detach(), None  # type: ignore[union-attr]
    if consistency is None and not wants:
        layers = native_layers(unwrapped(critic), real)
        if layers is not None and (shared is None or adversarial.linear or layers.weights[-1].shape[0] == 1):
            return native_step(layers, real, fake, points, adversarial, penalty)
    points = None if points is None else points_of(points)
    plain = [_Group(name, x) for name, x in (("real", real), ("fake", fake)) if x is not shared]
    if consistency is not None:
        plain.insert(1, _Group("again", real))
    penalised = (
        None if points is None else _Group({id(real): "real", id(fake): "fake"}.get(id(shared), "points"), points)
    )
    gradients = Gradients(differentiable)
    parts, inputs = [], []
    for unit in _units(plain, penalised):
        part, to_inputs = _run(critic, unit, adversarial, penalty, consistency, wants, gradients)
        parts.append(part)
        inputs += to_inputs
    loss, own, value, term = (torch.stack(column).sum(0) for column in zip(*parts, strict=True))
    if differentiable:
        loss = deliver(loss, [*gradients.all(), *_merged(inputs, real, fake)])
    return Parts(loss, own, value, term)


def _changes_in_passes(critic: Any) -> bool:
    """Whether a pass may leave the critic changed, as spectral norm's does: it has buffers and trains."""
    critic = unwrapped(critic)
    return isinstance(critic, nn.Module) and critic.training and any(True for _ in critic.buffers())


class _Group(NamedTuple):
    """A batch by the name of what it is: "fake", "real", "again" (real once more) or "points"."""

    name: str
    x: Tensor


class _Unit(NamedTuple):
    """Groups that go through the critic as one batch; the penalised one is last."""

    plain: list[_Group]
    penalised: _Group | None

    def groups(self) -> list[_Group]:
        return self.plain if self.penalised is None else [*self.plain, self.penalised]


def _units(plain: list[_Group], penalised: _Group | None) -> list[_Unit]:
    """As many units as can be: the consistency term's two passes stay together."""
    twice = any(group.name == "again" for group in plain)
    tied = [group for group in plain if group.name in ("real", "again")] if twice else []
    units = [_Unit([group], None) for group in plain if not any(group is one for one in tied)]
    if tied and penalised is not None and penalised.name == "real":
        return [*units, _Unit(tied, penalised)]
    first = [_Unit(tied, None)] if tied else []
    return [*first, *units, *([] if penalised is None else [_Unit([], penalised)])]


def _run(
    critic: Any,
    unit: _Unit,
    adversarial: Adversarial,
    penalty: Penalty | None,
    consistency: Consistency | None,
    wants: bool,
    gradients: Gradients,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[tuple[str, Tensor]]]:
    """A unit's share of the parts, with its weight gradients on ``gradients``, and its inputs' if they are wanted."""
    groups = unit.groups()
    n = len(groups[0].x)
    batch = torch.cat([g.x.detach() for g in groups]) if len(groups) > 1 else groups[0].x.detach()
    rows, plain = {group.name: slice(i * n, (i + 1) * n) for i, group in enumerate(groups)}, n * len(unit.plain)
    tape, output = record(critic, batch, wants_input=wants, onto=gradients)
    with torch.no_grad(), _passes(batch.device):
        own, term, seeds = _scores_and_seeds(tape, output, rows, adversarial, consistency)
        loss = own if consistency is None else own + consistency.weight * term
        value, gradient = torch.zeros_like(loss), None
        if unit.penalised is not None and penalty is not None:
            shared = unit.penalised.name != "points"
            top = node_of_scores(tape, scores_of(output))
            linear = adversarial.linear and consistency is None
            value, gradient = _penalised(tape, top, seeds, plain, shared, linear, penalty)
            loss = loss + penalty.weight * value
        elif gradients.wanted:
            gradient = record_input_gradient(tape, seeds, plain)
        to_inputs = []
        if wants:
            if gradient is None:
                raise NoRule("the scores do not depend on the input")
            to_inputs = [(group.name, gradient[rows[group.name]]) for group in unit.plain]
    return (loss, own, value, term), to_inputs


def _merged(inputs: Sequence[tuple[str, Tensor]], real: Tensor, fake: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The gradients at the real batch, from one or two passes, and at the fake one, where they are wanted."""
    found = []
    for x, names in ((real, ("real", "again")), (fake, ("fake",))):
        own = [g for name, g in inputs if name in names]
        if own and x.requires_grad:
            found.append((x, sum(own[1:], own[0]).to(x.dtype)))
    return found


def _penalised(
    tape: Tape, top: Node, seeds: dict[Node, Tensor], plain: int, shared: bool, linear: bool, penalty: Penalty
) -> tuple[Tensor, Tensor]:
    """The penalty's value and the gradient at the input; the weights' gradients of everything are on the tape.

    shared: the penalised rows' scores count in the loss too, so their seeds become adjoints of their own.
    """
    own = {node: seed[plain:].clone() for node, seed in seeds.items()} if shared else {}
    for node, seed in seeds.items():  # at penalised rows the gradient of the summed scores is pulled, not the loss's
        seed[plain:] = 1.0 if node is top else 0.0
    gradient = record_input_gradient(tape, seeds, plain)
    if gradient is None:
        raise NoRule("the scores do not depend on the input")
    at_points = gradient[plain:] if plain and gradient.shape[0] == tape.rows else gradient
    value, coefficient = ops.gradient_norm_penalty(at_points, penalty.target, penalty.one_sided, REDUCTIONS["mean"])
    if not tape.gradients.weights:
        return value, gradient
    weight = torch.full_like(value, penalty.weight)
    direction = ops.gradient_norm_penalty_backward(weight, at_points, coefficient)
    multiples = list(own) == [top] and (linear or own[top].numel() == own[top].shape[0])
    if tape.curved or (own and not multiples):
        add_curved_penalty_gradients(tape, direction, plain, own)
    else:
        scale = own[top].reshape(len(own[top]), -1)[:, 0] if own else None
        add_penalty_gradients(tape, direction, plain, scale)
    return value, gradient


def _scores_and_seeds(
    tape: Tape,
    output: Any,
    rows: Mapping[str, slice],
    adversarial: Adversarial,
    consistency: Consistency | None,
) -> tuple[Tensor, Tensor, dict[Node, Tensor]]:
    """The adversarial loss of the scores here, the consistency term, and the cotangents of scores and features."""
    scores = scores_of(output)
    kinds = {"real": adversarial.real, "fake": adversarial.fake}
    scored = [name for name in ("real", "fake") if name in rows]
    to_scores = torch.zeros_like(scores)
    seeds = {node_of_scores(tape, scores): to_scores}
    loss = scores.new_zeros((), dtype=accumulation_dtype(scores.dtype))
    one = torch.ones_like(loss)
    if scored:
        here = [scores[rows[name]] for name in scored]
        chosen = [kinds[name] for name in scored]
        loss = ops.score_loss(here, chosen)
        for name, seed in zip(scored, ops.score_loss_backward(one, here, chosen), strict=True):
            to_scores[rows[name]] = seed
    if consistency is None or "again" not in rows:
        return loss, torch.zeros_like(loss), seeds
    first, second = rows["real"], rows["again"]
    features = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    pair = (scores[first], scores[second])
    both = (features[first], features[second]) if features is not None else (scores.new_empty(len(pair[0]), 0),) * 2
    tensors = [x.to(loss.dtype) for x in (*pair, *both)]
    term, *coefficients = ops.consistency_term(*tensors, consistency.margin, consistency.feature_weight)
    grads = ops.consistency_backward(one * consistency.weight, *tensors, *coefficients, features is not None)
    to_scores[first] += grads[0]
    to_scores[second] += grads[1]
    node = None if features is None else tape.node_of(features)
    if features is not None and node is not None:
        to_features = torch.zeros_like(features)
        to_features[first], to_features[second] = grads[2], grads[3]
        seeds[node] = seeds[node] + to_features if node in seeds else to_features
    return loss, term, seeds
