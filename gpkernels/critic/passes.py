"""The passes over a tape, in the order that wastes nothing.

Rows of the batch come in two kinds: plain rows, whose scores have a cotangent, come first; penalised rows, at which the
gradient of the score itself is penalised, come last. See ``gpkernels.critic.tape`` for pull, push and curvature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from gpkernels.critic.tape import ALL_ROWS, Node, Tape


def record_input_gradient(tape: Tape, seeds: Mapping[Node, Tensor], plain: int) -> Tensor | None:
    """Pull the seeds down to the input; the plain rows' weight gradients are added on the way.

    The cotangents of trainable and curved layers at the penalised rows stay on the tape. Returns the gradient at the
    input: of the penalised rows, or of all rows where the input's gradient is wanted.
    """
    penalised = slice(plain, None)
    cotangents: dict[int, Tensor] = {node.index: seed for node, seed in seeds.items()}
    for node in reversed(tape.nodes[1:]):
        cotangent = cotangents.pop(node.index, None)
        if cotangent is None:
            continue
        rows = ALL_ROWS
        every = cotangent.shape[0] == tape.rows
        if node.trainable and plain:
            part = slice(0, plain)
            node.add_gradients(tape, cotangent[part], part)
        if plain < tape.rows and (node.trainable or node.curved):
            node.delta = cotangent[penalised] if every and plain else cotangent
        if node.free:
            if plain == tape.rows:
                continue
            rows = penalised
            cotangent = cotangent[penalised] if every and plain else cotangent
        _hand_down(tape, node, node.pull(cotangent, rows), cotangents, plain)
    return cotangents.get(0)


def add_penalty_gradients(tape: Tape, direction: Tensor, plain: int, scale: Tensor | None) -> None:
    """Push the direction through the penalised rows of a tape without curvature, adding the weights' gradients.

    ``scale``, one number per penalised row, adds the gradient of scale * score: its cotangents are multiples of those
    that the penalty has, so both share one product, delta (t + scale a)^T.
    """
    rows = slice(plain, None)
    for node, tangents in _pushed(tape, direction, rows):
        if not node.trainable or node.delta is None:
            continue
        operand = tangents[0]
        if scale is not None:
            by_row = scale.reshape(-1, *[1] * (node.x.dim() - 1)).to(node.x.dtype)
            own = node.x[rows]
            operand = own * by_row if operand is None else operand.addcmul(own, by_row)
            node.add_bias_gradient(tape, node.delta * scale.reshape(-1, *[1] * (node.delta.dim() - 1)))
        if operand is not None:
            node.add_weight_gradient(tape, node.delta, operand, rows)
        node.delta = None


def add_curved_penalty_gradients(tape: Tape, direction: Tensor, plain: int, seeds: Mapping[Node, Tensor]) -> None:
    """The same for a tape with curvature: push, then pull the activations' own adjoints, which start from ``seeds``."""
    rows = slice(plain, None)
    for node, reached in _pushed(tape, direction, rows):
        node.tangents = reached
    adjoints: dict[int, Tensor] = {node.index: seed for node, seed in seeds.items()}
    for node in reversed(tape.nodes[1:]):
        adjoint = adjoints.pop(node.index, None)
        delta, tangents, node.delta, node.tangents = node.delta, tuple(node.tangents), None, ()
        if node.trainable:
            if adjoint is not None:
                node.add_gradients(tape, adjoint, rows)
            if delta is not None and tangents and tangents[0] is not None:
                node.add_weight_gradient(tape, delta, tangents[0], rows)
        if node.free:
            continue
        if adjoint is not None:
            _hand_down(tape, node, node.pull(adjoint, rows), adjoints, plain)
        if node.curved and delta is not None and any(t is not None for t in tangents):
            _hand_down(tape, node, node.curvature(tangents, delta, rows), adjoints, plain)


def _pushed(tape: Tape, direction: Tensor, rows: slice) -> Iterator[tuple[Node, tuple[Tensor | None, ...]]]:
    """Each call that is reached with the tangents of its parents, as far as the last one that needs them."""
    last = max((node.index for node in tape.nodes if node.trainable or node.curved), default=0)
    known: dict[int, Tensor] = {0: direction}
    for node in tape.nodes[1 : last + 1]:
        tangents = tuple(None if p is None else known.get(p.index) for p in node.parents)
        yield node, tangents
        if node.index < last:
            tangent = node.push(tangents, rows)
            if tangent is not None:
                known[node.index] = tangent if tangent.dtype == node.dtype else tangent.to(node.dtype)
        for parent in node.parents:
            if parent is not None and parent.last_use == node.index:
                known.pop(parent.index, None)


def _hand_down(
    tape: Tape, node: Node, contributions: tuple[Tensor | None, ...], cotangents: dict[int, Tensor], plain: int
) -> None:
    """Add a call's contributions to its parents' cotangents."""
    for parent, contribution in zip(node.parents, contributions, strict=True):
        if parent is None or contribution is None:
            continue
        if parent.free and not parent.trainable and plain and contribution.shape[0] == tape.rows:
            contribution = contribution[plain:]
        if contribution.dtype != parent.dtype:
            contribution = contribution.to(parent.dtype)
        known = cotangents.get(parent.index)
        cotangents[parent.index] = contribution if known is None else known + contribution
