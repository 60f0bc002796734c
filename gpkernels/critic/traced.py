"""Penalties, losses and input gradients inside ``torch.compile``.

The compiler traces the critic's calls, with its guards on everything that they read. The passes traverse autograd's
graph of these calls by the same rules as in eager mode, once per trace, and their calls become part of the compiler's
graph: no zeros, no double backward. Importing this module imports the compiler, which takes seconds.
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
from gpkernels.critic.call import Group, Plain, check_scores, features_of, has_tangent, scores_of
from gpkernels.critic.deliver import TWICE
from gpkernels.critic.foreseen import as_one, begins, foresees, holds, learns
from gpkernels.critic.generic import Outsider
from gpkernels.critic.gradient import AGAIN, Gradient, Halves, Inputs, Made, by_itself, rows_of
from gpkernels.critic.graph import LEAF, Graph
from gpkernels.critic.layers import LAYERS
from gpkernels.critic.parts import Between, Task, called, constant_scores, points_of, rows_of_group
from gpkernels.critic.run import VALUES
from gpkernels.critic.together import Seen, keeps_apart
from gpkernels.critic.work import Known, work
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.private import comptime, forward_class


def step_in_graph(
    critic: Any,
    calls: Sequence[Sequence[Group]],
    task: Task,
    weights: Sequence[float],
    otherwise: Callable[[], Any],
    *,
    wants: bool = False,
    seen: Seen | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Return loss, adversarial, consistency and penalties of calls of the critic, each with the samples of some groups.

    otherwise: computes the same outside the compiler, for a critic that cannot be traced: at a graph break in a loop,
    Dynamo runs the function with the loop in Python. wants: whether scored samples require gradients. seen:
    observations that decide on one batch.
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
        scores, features = scores_of(output, called(task.pack)), features_of(output)
        if seen is not None and len(groups) > 1:
            comptime(holds)
        elif seen is not None and groups[-1].penalised:
            comptime(learns)
        outputs.append([scores] if features is None else [scores, features])
        batches.append(x)
        sources.append([x if isinstance(x, Tensor) else x[0] for x in given])
    names = [[(group.name, group.penalised) for group in groups] for groups in calls]
    return _passes(outputs, batches, sources, names, task, list(weights), wants)


@disable
def outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that the compiler does not trace."""
    return function(*args, **kwargs)


@allow_in_graph
def _batch(groups: Sequence[Any], moves: bool) -> Tensor:
    """Concatenate groups to the batch that the critic is called with; ``moves``: make it a leaf that requires grad."""
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
    weights: Sequence[float],
    wants: bool,
) -> tuple[Tensor, ...]:
    """The values, of which the first has the gradients; zeros for those that were not asked for."""
    for (scores, *_), x in zip(outputs, batches, strict=True):
        check_scores(scores, x, task.pack)
    scored = [
        x
        for xs, of in zip(sources, names, strict=True)
        for x, (_, penalised) in zip(xs, of, strict=True)
        if not penalised
    ]
    _check_no_tangent("critic", [*(u for some in outputs for u in some), *scored])
    with torch.no_grad(), _plain():
        like = outputs[0][0]
        wide = accumulation_dtype(like.dtype)
        zero = lambda: torch.zeros((), dtype=wide, device=like.device)  # noqa: E731
        # Without C++ gradients cannot be attached to the weights.
        if backends.program is None or _hooked([u for some in outputs for u in some], batches):
            calls = zip(names, batches, outputs, strict=True)
            plain = [Plain(tuple(groups), x, list(some)) for groups, x, some in calls]
            loss, *others = losses(plain, task, weights)
            assert loss is not None
            given = _at_samples(loss, plain, sources) if wants else []
            if given:
                with torch.enable_grad():
                    loss = loss + _Deliver.apply(zero(), len(given), *[g for _, g in given], *[x for x, _ in given])
            return loss, *(zero() if x is None else x.detach() for x in others)
        passes = [_Traced(*one, wants, task.pack) for one in zip(outputs, batches, names, strict=True)]
        unit = torch.ones((), dtype=wide, device=like.device)
        flat = [source for given in sources for source in given]
        numbers = [unit, *(unit * weight for weight in weights)]
        (loss, *others), gradients, at_samples = _gone_through(passes, task, numbers)
        loss = others[-1].clone() if loss is None else loss  # for a penalty alone
        given = [(x, g) for x, g in zip(flat, at_samples, strict=True) if g is not None and x.requires_grad]
        pairs = [*gradients, *given]
    if pairs:
        loss = _Deliver.apply(loss, len(pairs), *[g for _, g in pairs], *[x for x, _ in pairs])
    return loss, *(zero() if x is None else x for x in others)


def _check_no_tangent(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise where forward-mode differentiation asks for the tangent of what a compiled call computes."""
    if has_tangent(tensors):
        raise RuntimeError(
            f"{name} is called with a forward-mode tangent, which torch.compile does not propagate here; leave this "
            "call uncompiled"
        )


def _hooked(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether the critic registers hooks on gradients, which autograd calls."""
    native = backends.program
    return native is not None and bool(native.any_hooks([u for u in outputs if u.requires_grad], list(inputs)))


def _at_samples(
    loss: Tensor, calls: Sequence[Plain], sources: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the scored samples that require gradients, with these, by autograd."""
    found = torch.autograd.grad(loss, [one.x for one in calls], retain_graph=True, allow_unused=True)
    return [
        (source, rows_of_group(g, one.groups, name))
        for one, g, given in zip(calls, found, sources, strict=True)
        for (name, penalised), source in zip(one.groups, given, strict=True)
        if g is not None and not penalised and source.requires_grad
    ]


def gradient_in_graph(
    model: Callable[..., Any],
    inputs: Inputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str,
    otherwise: Callable[[], Any],
) -> tuple[Any, Any]:
    """Return a model's output and its scores' gradient at the inputs; ``otherwise``: as in ``step_in_graph``."""
    if not is_compiling():
        found: tuple[Any, Any] = outside(otherwise)
        return found
    moved: list[Tensor] = []
    output = None
    for _ in range(1):  # Dynamo resumes a function after a graph break, without the graph before it, unless in a loop
        moved = [_batch([x], True) for x in inputs.tensors]
        with torch.enable_grad():
            output = model(inputs.filled(moved), *args, **kwargs)
    made = Made.of(output, moved, name)
    outputs = made.outputs
    given = _gradient(outputs, made.score, moved, inputs.tensors, name)
    return made.filled(given[: len(outputs)]), inputs.gradients(given[len(outputs) :])


@allow_in_graph
def _gradient(
    outputs: Sequence[Tensor], score: int, inputs: Sequence[Tensor], sources: Sequence[Tensor], name: str
) -> tuple[Tensor | None, ...]:
    """Return outputs, and gradients at the inputs, with their derivatives."""
    _check_no_tangent(name, [*outputs, *sources])
    differentiable = torch.is_grad_enabled()
    wanted = [x.requires_grad and differentiable for x in sources]
    if _hooked(outputs, inputs):
        return _hooked_gradient(outputs, score, inputs, any(wanted), name)
    graph = Graph(outputs)
    places = [next((i for i, leaf in enumerate(graph.leaves) if leaf is x), -1) for x in inputs]
    if all(place < 0 for place in places):
        raise constant_scores(name)
    known = Halves(graph.key, score, places, wanted, rows_of(inputs))
    ends = [i for i, fact in enumerate(graph.key[0]) if fact[0] == LEAF]
    outsider = Outsider(graph.nodes, frozenset(ends), again=True) if known.generic else None
    values = [u.detach() for u in outputs]
    with torch.no_grad(), _plain():
        results = known.pull([*values, *graph.saved], outsider)
    gradients, kept = results[: len(inputs)], results[len(inputs) :]
    if not differentiable:
        return *values, *gradients
    leaves: list[Tensor | None] = []
    for i, leaf in zip(ends, graph.leaves, strict=True):
        at = places.index(len(leaves)) if len(leaves) in places else None
        if at is not None:
            leaves.append(sources[at] if wanted[at] else None)
        else:
            leaves.append(_joined(graph.nodes[i]) if leaf is None else leaf)
    held = known, outsider, values, gradients, [*graph.saved, *kept]
    given = iter(_Gradient.apply(held, *leaves))
    return *[next(given) for _ in values], *[None if g is None else next(given) for g in gradients]


def _hooked_gradient(
    outputs: Sequence[Tensor], score: int, inputs: Sequence[Tensor], wanted: bool, name: str
) -> tuple[Tensor | None, ...]:
    """Return what ``_gradient`` does, by autograd, which calls hooks."""
    if wanted:
        raise RuntimeError(
            f"{name} registers hooks on gradients, and x requires a gradient, which torch.compile does not support "
            "here; detach x, or leave this call uncompiled"
        )
    differentiable = torch.is_grad_enabled()
    scores = outputs[score]
    found = torch.autograd.grad(
        scores, inputs, torch.ones_like(scores), create_graph=differentiable, retain_graph=True, allow_unused=True
    )
    if all(g is None for g in found):
        raise constant_scores(name)
    return *[u.view_as(u) if differentiable else u.detach() for u in outputs], *found


def _joined(edge: Any) -> Tensor | None:
    """Return a tensor through which gradients reach an edge, where C++ can make one."""
    found: Tensor | None = None if backends.program is None else backends.program.joint(*edge)
    return found


class _Gradient(Gradient):
    """``Gradient`` in a trace: it retains all tensors, and computes with PyTorch's own operations."""

    @staticmethod
    def forward(ctx: Any, held: Any, *leaves: Tensor | None) -> Any:
        ctx.tensors = held[4]
        return Gradient.forward(ctx, (*held[:4], []), *leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(AGAIN)
        given = Gradient.given(ctx, cotangents)
        if all(c is None for c in given):
            return (None,) * (1 + ctx.known.plan.leaves)
        run = lambda: ctx.known.finish([*given, *ctx.tensors], ctx.outsider)  # noqa: E731
        with torch.no_grad(), _plain():
            return None, *(run() if ctx.outsider is None else by_itself(run))


class _Traced:
    """One traced call of the critic, and its graph. x: the batch; groups: as in ``Pass``."""

    def __init__(
        self, outputs: Sequence[Tensor], x: Tensor, groups: Sequence[tuple[str, bool]], wants: bool, pack: int
    ) -> None:
        self.outputs, self.x, self.groups, self.wants = outputs, x, tuple(groups), wants
        self.each = x.shape[0] // len(groups) // (pack or 1)
        graph = Graph([u for u in outputs if u.requires_grad])
        self.nodes, self.saved, self.leaves = graph.nodes, graph.saved, graph.leaves
        self.ends = [i for i, fact in enumerate(graph.key[0]) if fact[0] == LEAF]  # indices of the leaves
        self.x_leaf = next((i for i, leaf in enumerate(self.leaves) if leaf is x), None)
        if self.x_leaf is None and any(penalised for _, penalised in groups):
            raise constant_scores(called(pack))
        metas = tuple([(u.shape, u.stride(), u.dtype, u.device, u.requires_grad) for u in outputs])
        self.key = graph.key, self.x_leaf, wants, self.groups, self.each, metas, pack


def _gone_through(passes: Sequence[_Traced], task: Task, numbers: Sequence[Tensor]) -> Any:
    """Return the values, the weights with their gradients, and the gradients at each group's samples."""
    tensors: list[Tensor | None] = [*numbers]
    weights: dict[Any, Tensor] = {}  # by the edge that leads to it
    leaves = []
    for one in passes:
        tensors += [u.detach() for u in one.outputs]
        tensors += one.saved
        edges = [one.nodes[i] for i in one.ends]
        for edge, leaf in zip(edges, one.leaves, strict=True):
            if edge not in weights:
                weights[edge] = backends.program.joint(*edge) if leaf is None else leaf
        places = list(weights)
        leaves.append(tuple([places.index(edge) for edge in edges]))
    known = Known([one.key for one in passes], leaves)
    for one, plan in zip(passes, known.plans, strict=True):
        why = keeps_apart(plan, plan.outputs[0][0]) if len(one.groups) > 1 else None
        if why is not None:
            raise ValueError(
                f"together: expected a critic whose samples are independent, got one in which they interact: {why}"
            )
    outsiders = [Outsider(one.nodes, frozenset(one.ends)) for one in passes]

    def outsider(what: Any, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        return outsiders[what[0]](what[1:], given)

    found = work(known, task, tensors, outsider)
    values = len(VALUES) + len(task.penalties)
    gradients = zip(weights.values(), found[values : values + len(weights)], strict=True)
    return found[:values], [(x, g) for x, g in gradients if g is not None], found[values + len(weights) :]


@allow_in_graph
def layer_in_graph(number: int, *args: Any, **kwargs: Any) -> Any:
    """A layer of ``fast_double_backward``, by its number among these."""
    return list(LAYERS.values())[number](*args, **kwargs)


def _plain() -> Any:
    """Context manager that selects PyTorch's own operations under a compiler, which can fuse them."""
    return backends.backend("reference") if is_compiling() else nullcontext()


class _Deliver(Function):
    """Value with precomputed gradients of some tensors: ``count`` gradients, then the tensors."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.tensors = tensors[:count], tensors[count:]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        return None, None, *[None] * len(ctx.gradients), *[g * cotangent for g in ctx.gradients]


def delivered_by(x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """Return the tensors and gradients attached to ``x``, if that is all that it depends on; else None."""
    node = x.grad_fn
    if forward_class(node) is not _Deliver:
        return None
    return list(zip(node.tensors, node.gradients, strict=True))  # type: ignore[union-attr]
