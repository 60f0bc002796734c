"""Penalties and losses inside ``torch.compile``.

The compiler traces the critic's calls as it traces everything, with its guards on all that they read. What autograd
then knows of these calls is gone through by the same rules as outside, once for each trace, and what the rules call is
in the compiler's graph: no zeros, no double backward. Importing this imports the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import allow_in_graph, disable, is_compiling

from gpkernels import backends
from gpkernels.critic.by_autograd import losses
from gpkernels.critic.call import Group, Plain, check_scores, features_of, scores_of
from gpkernels.critic.foreseen import as_one, begins, foresees, holds, learns
from gpkernels.critic.generic import Outsider
from gpkernels.critic.graph import LEAF, Graph
from gpkernels.critic.layers import LAYERS
from gpkernels.critic.parts import Between, Task, points_of
from gpkernels.critic.program import watched
from gpkernels.critic.together import Seen, keeps_apart
from gpkernels.critic.work import Known, work
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.private import comptime, forward_class


def step_in_graph(
    critic: Any,
    calls: Sequence[Sequence[Group]],
    task: Task,
    weight: float,
    otherwise: Callable[[], Any],
    *,
    wants: bool = False,
    seen: Seen | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Loss, adversarial, penalty and consistency of some calls of the critic, each with the samples of some groups.

    otherwise: gives the same outside the compiler, for a critic that it cannot trace: where a graph breaks in a loop,
    the function with the loop is left to Python. wants: whether the samples that are scored have gradients, too. seen:
    where all may go as one batch.
    """
    if not is_compiling():
        if seen is not None:
            seen.untraced = critic
        return outside(otherwise)
    outputs, batches, sources = [], [], []
    if seen is not None and not foresees():
        seen = None
    if seen is not None and as_one(seen):
        calls = [[group for call in calls for group in call]]
    for groups in calls:
        given = [tuple(group.x) if isinstance(group.x, Between) else group.x for group in groups]
        x = _batch(given, wants or any(group.penalised for group in groups))
        if seen is not None and groups[-1].penalised:
            comptime(begins)
        with torch.enable_grad():
            output = critic(x, *args, **(kwargs or {}))
        scores, features = scores_of(output), features_of(output)
        if seen is not None and len(groups) > 1:
            comptime(holds)
        elif seen is not None and groups[-1].penalised:
            comptime(learns)
        outputs.append([scores] if features is None else [scores, features])
        batches.append(x)
        sources.append([x if isinstance(x, Tensor) else x[0] for x in given])
    names = [[(group.name, group.penalised) for group in groups] for groups in calls]
    return _passes(outputs, batches, sources, names, task, weight, wants)


@disable
def outside(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives that the compiler leaves alone."""
    return function(*args)


@allow_in_graph
def _batch(groups: Sequence[Any], moves: bool) -> Tensor:
    """What the critic is called with; ``moves``: a leaf, whose gradient can be had."""
    with torch.no_grad(), _plain():
        points = [x.detach() if isinstance(x, Tensor) else points_of(Between(*x)) for x in groups]
        x = torch.cat(points) if len(points) > 1 else points[0]
    return x.requires_grad_() if moves else x


@allow_in_graph
def _passes(
    outputs: Sequence[Sequence[Tensor]],
    batches: Sequence[Tensor],
    sources: Sequence[Sequence[Tensor]],
    names: Sequence[Sequence[tuple[str, bool]]],
    task: Any,
    weight: float,
    wants: bool,
) -> tuple[Tensor, ...]:
    """The values, of which the first has the gradients; zeros for those that were not asked for."""
    if not task.by_point:
        for (scores, *_), x in zip(outputs, batches, strict=True):
            check_scores(scores, x)
    with torch.no_grad(), _plain():
        like = outputs[0][0]
        wide = accumulation_dtype(like.dtype)
        zero = lambda: torch.zeros((), dtype=wide, device=like.device)  # noqa: E731
        # Nothing can join the gradients to the weights, or nobody writes down what is called here.
        if backends.program is None or not (is_compiling() or watched()):
            calls = zip(names, batches, outputs, strict=True)
            plain = [Plain(tuple(groups), len(x) // len(groups), x, list(some)) for groups, x, some in calls]
            loss, *others = losses(plain, task, weight)
            return loss, *(zero() if x is None else x.detach() for x in others)
        passes = [_Traced(*one, wants) for one in zip(outputs, batches, names, strict=True)]
        unit = torch.ones((), dtype=wide, device=like.device)
        flat = [source for given in sources for source in given]
        (loss, *others), gradients, at_samples = _gone_through(passes, task, unit * weight, unit)
        given = [(x, g) for x, g in zip(flat, at_samples, strict=True) if g is not None and x.requires_grad]
        pairs = [*gradients, *given]
    if pairs:
        loss = _Deliver.apply(loss, len(pairs), *[g for _, g in pairs], *[x for x, _ in pairs])
    return loss, *(zero() if x is None else x for x in others)


class _Traced:
    """One call of the critic that is traced, and its graph. x: the batch; groups: as in ``Pass``."""

    def __init__(self, outputs: Sequence[Tensor], x: Tensor, groups: Sequence[tuple[str, bool]], wants: bool) -> None:
        self.outputs, self.x, self.groups, self.wants = outputs, x, tuple(groups), wants
        self.each = x.shape[0] // len(groups)
        graph = Graph([u for u in outputs if u.requires_grad])
        self.nodes, self.saved, self.leaves = graph.nodes, graph.saved, graph.leaves
        self.ends = [i for i, fact in enumerate(graph.key[0]) if fact[0] == LEAF]  # the leaves among the nodes
        self.x_leaf = next((i for i, leaf in enumerate(self.leaves) if leaf is x), None)
        if self.x_leaf is None and any(penalised for _, penalised in groups):
            raise ValueError("critic: expected scores that depend on the input, got scores that do not")
        metas = tuple([(u.shape, u.stride(), u.dtype, u.device, u.requires_grad) for u in outputs])
        self.key = graph.key, self.x_leaf, wants, self.groups, self.each, metas


def _gone_through(passes: Sequence[_Traced], task: Task, weight: Tensor, unit: Tensor) -> Any:
    """The values, the weights with their gradients, and the gradients at each group's samples."""
    tensors: list[Tensor | None] = [weight, unit]
    weights: dict[Any, Tensor] = {}  # by the edge that leads to it
    numbers = []
    for one in passes:
        tensors += [u.detach() for u in one.outputs]
        tensors += one.saved
        edges = [one.nodes[i] for i in one.ends]
        for edge, leaf in zip(edges, one.leaves, strict=True):
            if edge not in weights:
                weights[edge] = backends.program.joint(*edge) if leaf is None else leaf
        places = list(weights)
        numbers.append(tuple([places.index(edge) for edge in edges]))
    known = Known([one.key for one in passes], numbers)
    for one, plan in zip(passes, known.plans, strict=True):
        why = keeps_apart(plan, plan.outputs[0][0]) if len(one.groups) > 1 else None
        if why is not None:
            raise ValueError(
                f"together: expected a critic in which samples do not meet, got one in which they do: {why}"
            )
    outsiders = [Outsider(one.nodes, frozenset(one.ends)) for one in passes]

    def outsider(what: Any, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        return outsiders[what[0]](what[1:], given)

    found = work(known, task, tensors, outsider)
    gradients = zip(weights.values(), found[4 : 4 + len(weights)], strict=True)
    return found[:4], [(x, g) for x, g in gradients if g is not None], found[4 + len(weights) :]


@allow_in_graph
def layer_in_graph(number: int, *args: Any, **kwargs: Any) -> Any:
    """A layer of ``fast_double_backward``, by its number among these."""
    return list(LAYERS.values())[number](*args, **kwargs)


def _plain() -> Any:
    """Context: a compiler is given PyTorch's own calls, which it can fuse."""
    return backends.backend("reference") if is_compiling() else nullcontext()


class _Deliver(Function):
    """A value with known gradients of some tensors: ``count`` gradients, then the tensors."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.tensors = tensors[:count], tensors[count:]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return None, None, *[None] * len(ctx.gradients), *[g * cotangent for g in ctx.gradients]


def delivered_by(x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """Tensors with their gradients where ``x`` is a value whose gradients are known, and nothing more; else None."""
    node = x.grad_fn
    if forward_class(node) is not _Deliver:
        return None
    return list(zip(node.tensors, node.gradients, strict=True))  # type: ignore[union-attr]
