"""A critic's penalty or whole loss with its weight gradients, computed together in the forward call.

One batch holds every sample that the critic must see, plain rows first and penalised rows last. The weight gradients
are scaled in backward, so nothing is ever differentiated twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gpkernels import ops
from gpkernels.critic.passes import add_curved_penalty_gradients, add_penalty_gradients, record_input_gradient
from gpkernels.critic.registry import RULES
from gpkernels.critic.tape import Node, NoRule, Tape, unwrapped
from gpkernels.reference import REDUCTIONS

_recordable: WeakSet[Any] = WeakSet()
_refused: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


def record(
    critic: Any, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, wants_input: bool = False
) -> tuple[Tape, Any]:
    """Run the critic on a batch of its own and return the tape and the output; NoRule where that cannot be done.

    What was refused once is refused at once as long as the critic consists of the same layers; random numbers that a
    refused attempt drew are given back.
    """
    critic = unwrapped(critic)
    module = isinstance(critic, nn.Module)
    if module and critic in _refused:
        layers, reason = _refused[critic]
        if layers == _layers_of(critic):
            raise NoRule(reason)
    state = None if module and critic in _recordable else _random_state(x.device)
    try:
        tape = Tape(RULES, x, wants_input)
        with torch.enable_grad(), tape:
            output = critic(x, *args, **(kwargs or {}))
        tape.finish()
    except NoRule as refusal:
        if state is not None:
            _restore(state, x.device)
        if module:
            _refused[critic] = _layers_of(critic), str(refusal)
        raise
    if module:
        _recordable.add(critic)
    return tape, output


def _layers_of(critic: nn.Module) -> tuple[Any, ...]:
    """What must stay for a refusal to stay: the layers and their modes."""
    return tuple((type(module), module.training) for module in critic.modules())


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


# --- gradients that are scaled in backward ----------------------------------------------------------------------------


class _Deliver(Function):
    """A value whose gradients are known: backward multiplies them by the cotangent."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Any:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this penalty holds its weight gradients and cannot be differentiated twice; call it inside "
                "gpkernels.fast_double_backward(), where it is made of PyTorch's own operations"
            )
        return None, None, *torch._foreach_mul(ctx.gradients, cotangent)


def deliver(value: Tensor, tape: Tape, inputs: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
    """The value with the tape's weight gradients, and gradients of given inputs, for autograd."""
    weights = list(tape.weights.values())
    known = (tape.gradients.get(key) for key in tape.weights)
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, known, strict=True)]
    tensors, more = [*weights, *(x for x, _ in inputs)], [*gradients, *(g for _, g in inputs)]
    if not tensors:
        return value
    delivered: Tensor = _Deliver.apply(value, more, *tensors)
    return delivered


def _passes(device: torch.device) -> Any:
    """The passes choose their own dtypes."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def scores_of(output: Any) -> Tensor:
    """The scores in a critic's output: a tensor, or the first of a tuple."""
    scores = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(scores, Tensor):
        raise TypeError(f"critic: expected scores as a tensor, or first in a tuple, got {type(output).__name__}")
    return scores


def _node(tape: Tape, x: Tensor) -> Node:
    node = tape.node_of(x)
    if node is None:
        raise NoRule("the scores were not computed on the tape")
    return node


# --- a penalty alone --------------------------------------------------------------------------------------------------


def penalty_on_gradient(
    critic: Any,
    points: Tensor,
    target: float,
    one_sided: bool,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    by_point: bool = False,
) -> Tensor:
    """Mean (|grad| - target)^2 of the summed scores at the points, weight gradients included; NoRule if it cannot be.

    by_point: the norm is over the last axis alone.
    """
    tape, output = record(critic, points.detach(), args, kwargs)
    wanted = torch.is_grad_enabled() and tape.weights
    with torch.no_grad(), _passes(points.device):
        scores = scores_of(output)
        gradient = record_input_gradient(tape, {_node(tape, scores): torch.ones_like(scores)}, 0)
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
    return deliver(value, tape)


# --- the whole loss ---------------------------------------------------------------------------------------------------


class Adversarial(NamedTuple):
    """The score losses of real and fake rows, by ``reference.SCORE_LOSSES``, and whether both are linear."""

    real: int
    fake: int
    linear: bool


class Consistency(NamedTuple):
    """CT-GAN's term between two passes over the real batch."""

    weight: float
    margin: float
    feature_weight: float


class Penalty(NamedTuple):
    """The penalty on the gradient at the points: weight * mean (|g| - target)^2."""

    weight: float
    target: float
    one_sided: bool


class Parts(NamedTuple):
    loss: Tensor
    adversarial: Tensor
    penalty: Tensor
    consistency: Tensor


def critic_step(
    critic: Any,
    real: Tensor,
    fake: Tensor,
    points: Tensor | None,
    adversarial: Adversarial,
    penalty: Penalty | None,
    consistency: Consistency | None,
) -> Parts:
    """All parts of a critic's loss in one batch; NoRule where the critic cannot be recorded.

    points: where the gradient is penalised; the very tensor ``real`` or ``fake`` shares its rows with the scores.
    """
    differentiable = torch.is_grad_enabled()
    wants = [x for x in (real, fake) if differentiable and x.requires_grad]
    shared = points if points is real or points is fake else None
    if wants and shared is not None:  # its own gradient is not that of the penalty's rows
        points, shared = points.detach(), None  # type: ignore[union-attr]
    n = real.shape[0]
    groups: list[Tensor] = [x for x in (fake, real) if x is not shared]
    if consistency is not None:
        groups.append(real)
    plain = n * len(groups)
    if points is not None:
        groups.append(points)
    batch = torch.cat([x.detach() for x in groups])
    tape, output = record(critic, batch, wants_input=bool(wants))
    rows = _row_slices(real, fake, shared, n, plain, consistency is not None)
    with torch.no_grad(), _passes(real.device):
        loss, parts, seeds = _scores_and_seeds(tape, output, rows, adversarial, consistency)
        value, gradient = torch.zeros_like(loss), None
        if points is not None and penalty is not None:
            top = _node(tape, scores_of(output))
            value, gradient = _penalised(tape, top, seeds, plain, shared is not None, adversarial.linear, penalty)
            loss = loss + penalty.weight * value
        elif differentiable:
            gradient = record_input_gradient(tape, seeds, plain)
    if differentiable:
        loss = deliver(loss, tape, _input_gradients(gradient, real, fake, rows) if wants else ())
    return Parts(loss, parts[0], value, parts[1])


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
    if not tape.weights:
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


def _row_slices(
    real: Tensor, fake: Tensor, shared: Tensor | None, n: int, plain: int, consistent: bool
) -> dict[str, slice]:
    """Where fake, real and the second real pass lie in the batch."""
    rows, start = {}, 0
    for name, x in (("fake", fake), ("real", real)):
        if x is shared:
            rows[name] = slice(plain, plain + n)
        else:
            rows[name] = slice(start, start + n)
            start += n
    if consistent:
        rows["again"] = slice(start, start + n)
    return rows


def _scores_and_seeds(
    tape: Tape,
    output: Any,
    rows: Mapping[str, slice],
    adversarial: Adversarial,
    consistency: Consistency | None,
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[Node, Tensor]]:
    """The loss of the scores, its parts, and its cotangents: of the scores, and of features where they count."""
    scores = scores_of(output)
    kinds = [adversarial.real, adversarial.fake]
    pair = [scores[rows["real"]], scores[rows["fake"]]]
    loss = ops.score_loss(pair, kinds)
    to_scores = torch.zeros_like(scores)
    one = torch.ones_like(loss)
    for name, seed in zip(("real", "fake"), ops.score_loss_backward(one, pair, kinds), strict=True):
        to_scores[rows[name]] = seed
    seeds = {_node(tape, scores): to_scores}
    if consistency is None:
        return loss, (loss, torch.zeros_like(loss)), seeds
    features = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    first, second = rows["real"], rows["again"]
    both = (features[first], features[second]) if features is not None else (scores.new_empty(len(pair[0]), 0),) * 2
    dtype = loss.dtype
    tensors = [x.to(dtype) for x in (scores[first], scores[second], *both)]
    term, *coefficients = ops.consistency_term(*tensors, consistency.margin, consistency.feature_weight)
    grads = ops.consistency_backward(one * consistency.weight, *tensors, *coefficients, features is not None)
    to_scores[first] += grads[0]
    to_scores[second] += grads[1]
    if features is not None:
        node = tape.node_of(features)
        if node is not None:
            to_features = torch.zeros_like(features)
            to_features[first], to_features[second] = grads[2], grads[3]
            seeds[node] = seeds[node] + to_features if node in seeds else to_features
    return loss + consistency.weight * term, (loss, term), seeds


def _input_gradients(
    gradient: Tensor | None, real: Tensor, fake: Tensor, rows: Mapping[str, slice]
) -> list[tuple[Tensor, Tensor]]:
    """The loss's gradients at the real and the fake batch, where they are wanted."""
    if gradient is None:
        raise NoRule("the scores do not depend on the input")
    found = []
    for name, x in (("real", real), ("fake", fake)):
        if x.requires_grad:
            own = gradient[rows[name]]
            own = own + gradient[rows["again"]] if name == "real" and "again" in rows else own
            found.append((x, own.to(x.dtype)))
    return found
