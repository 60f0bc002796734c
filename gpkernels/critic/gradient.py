"""The input gradient of a model, as a value that any loss may use.

The forward call pulls the cotangents of the summed scores back to the inputs and saves those that backward needs.
Backward receives the cotangents of the gradients and of the model's outputs: it pushes the former forward as tangents,
and computes all weight gradients in one pass back. Nothing is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gpkernels import backends
from gpkernels.critic import uncompiled
from gpkernels.critic.by_autograd import left_to_autograd
from gpkernels.critic.call import refuse_symbols, scores_of
from gpkernels.critic.compiled import Options
from gpkernels.critic.generic import Outsider
from gpkernels.critic.graph import Graph, attributes, prepare_graph, prepare_nodes
from gpkernels.critic.parts import constant_scores
from gpkernels.critic.passes import Passes, totals
from gpkernels.critic.picked import planned
from gpkernels.critic.plan import Place
from gpkernels.critic.program import CAPACITY, Cache
from gpkernels.critic.run import is_plain, own_dtypes
from gpkernels.critic.surroundings import surroundings
from gpkernels.critic.work import apart
from gpkernels.private import (
    FROM_LOCAL,
    REENTRANT,
    dual_level,
    graph_is_kept,
    is_batched,
    is_legacy_batched,
    next_sequence_number,
    tree_flatten,
    tree_unflatten,
)

Given = Sequence[Tensor | None]
AGAIN = (
    "this gradient holds its derivative and cannot be differentiated twice more; call it inside "
    "gpkernels.fast_double_backward(), where it is made of PyTorch's own operations"
)


class Halves:
    """Facts about both halves, forward and backward, that follow from a graph's key; shared by all runs.

    score: index of the output that is summed and differentiated. inputs: their numbers among the leaves, -1 for inputs
    that are not in the graph. wanted: whether backward also computes their gradients. rows: as in ``Plan``. graph:
    whether there is a backward half.
    """

    again = AGAIN

    def __init__(
        self,
        key: Any,
        score: int,
        inputs: Sequence[int],
        wanted: Sequence[bool],
        rows: int | None,
        graph: bool = True,
    ) -> None:
        moving = {number: wants for number, wants in zip(inputs, wanted, strict=True) if number >= 0}
        self.plan, self.score, self.graph = planned(key, moving, rows, 0), score, graph
        self.places = [self.plan.inputs.get(number) for number in inputs]
        self.generic = any(call.rule is None and not call.leaf for call in self.plan.calls)
        self.kept: list[tuple[int, int]] = []  # calls and outputs whose cotangents backward needs
        self.sloped: list[int] = []  # calls whose first derivative is kept, too
        self.finishes = Cache(16)  # signatures of backward, by the cotangents that are given

    def pull(self, tensors: Given, outsider: Any) -> list[Tensor | None]:
        """Return the gradients at the inputs, then what backward needs. tensors: the outputs, then the saved ones."""
        plan, count = self.plan, len(self.plan.outputs)
        scores = tensors[self.score]
        assert scores is not None
        passes = Passes(plan, tensors[count:], outsider, only_pulls=True)
        found = passes.pull({plan.outputs[self.score]: torch.ones_like(scores)})
        gradients = [
            None if p is None else found[p] if p in found else plan.calls[p[0]].outputs[p[1]].zeros()
            for p in self.places
        ]
        if not self.graph:
            return apart(gradients, tensors)
        deltas, slopes = passes.deltas, passes.slopes()
        self.kept = [(i, nr) for i in sorted(deltas) for nr, u in enumerate(deltas[i]) if u is not None]
        self.sloped = [i for i in sorted(slopes) if i in deltas]
        kept = [*(deltas[i][nr] for i, nr in self.kept), *(slopes[i] for i in self.sloped)]
        return [*apart(gradients, [*tensors, *kept]), *kept]

    def finish(self, tensors: Given, outsider: Any) -> list[Tensor | None]:
        """Return the gradients of all leaves.

        tensors: the cotangents of outputs and gradients, the saved tensors, those that ``pull`` returned for backward.
        """
        return apart(self._finish(tensors, outsider), tensors)

    def _finish(self, tensors: Given, outsider: Any) -> list[Tensor | None]:
        plan, count, inputs = self.plan, len(self.plan.outputs), len(self.places)
        values, gradients = tensors[:count], tensors[count : count + inputs]
        kept = count + inputs + plan.saved_count
        passes = Passes(plan, tensors[count + inputs : kept], outsider)
        sloped = kept + len(self.kept)
        for (i, nr), u in zip(self.kept, tensors[kept:sloped], strict=True):
            passes.deltas.setdefault(i, [None] * len(plan.calls[i].outputs))[nr] = u
        for i, slope in zip(self.sloped, tensors[sloped:], strict=True):
            assert slope is not None
            passes.give_slope(i, slope)
        directions = {p: v for p, v in zip(self.places, gradients, strict=True) if p is not None and v is not None}
        if directions:
            passes.push(directions)
        seeds: dict[Place, Tensor] = {}
        for place, u in zip(plan.outputs, values, strict=True):
            if u is not None:
                seeds[place] = seeds[place] + u if place in seeds else u
        scale = self._scale(seeds) if directions else None
        at_inputs = passes.bend({} if scale is not None else seeds, scale)
        parts = passes.leaves()
        sums = dict(zip(parts, totals(list(parts.values())), strict=True))
        for number, place in plan.inputs.items():
            if place in at_inputs and plan.calls[place[0]].trains:
                sums[number] = at_inputs[place]
        for leaf in plan.reached(passes.bent(), plan.outputs[self.score], seeds):  # zeros where PyTorch has zeros
            if leaf.trains and leaf.number not in sums:
                sums[leaf.number] = leaf.outputs[0].zeros()
        return [sums.get(number) for number in range(plan.leaves)]

    def finished(self, given: Given, tensors: Given, outsider: Any = None) -> tuple[list[Tensor | None], Any]:
        """Return the gradients of all leaves, and the program in C++ that computes them, or None.

        given: cotangents, of which there is at least one, of outputs and gradients. tensors: the others of ``finish``.
        """
        some = [c for c in given if c is not None]
        with own_dtypes(some[0].device):
            if any(is_batched(c) or is_legacy_batched(c) for c in some):
                found = self._finish([*given, *tensors], outsider)
                return [None if g is None else g.clone() for g in found], None
            key = tuple([None if c is None else (c.shape, c.stride(), c.dtype) for c in given])
            signature = self.finishes.get(key, lambda: self)
            return list(signature.run([*given, *tensors], self.finish, outsider or _nobody)), signature.native

    def _scale(self, seeds: Mapping[Place, Tensor]) -> Tensor | None:
        """Return one factor per sample if the scores' cotangents are such multiples of the pulled ones, else None."""
        plan = self.plan
        if plan.layouts is None or plan.curved or list(seeds) != [plan.outputs[self.score]]:
            return None
        if any(plan.calls[place[0]].trains for place in plan.inputs.values()):
            return None
        (seed,) = seeds.values()
        return seed.reshape(plan.rows) if seed.numel() == plan.rows else None


def _flat(x: Any) -> tuple[list[Any], Any]:
    """Flatten like ``tree_flatten``, which takes microseconds; the structure of a single tensor is None."""
    return ([x], None) if isinstance(x, Tensor) else tree_flatten(x)


def _whole(flat: list[Any], structure: Any) -> Any:
    return flat[0] if structure is None else tree_unflatten(flat, structure)


class Inputs:
    """Input of a model: a tensor, or a tuple, list or dict of tensors. tensors: those that can be differentiated."""

    def __init__(self, x: Any) -> None:
        self._flat, self._spec = _flat(x)
        self._at = [i for i, t in enumerate(self._flat) if isinstance(t, Tensor) and t.is_floating_point()]
        self.tensors: list[Tensor] = [self._flat[i] for i in self._at]
        self.wanted = tuple([t.requires_grad for t in self.tensors])

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Return the input with its tensors replaced."""
        flat = list(self._flat)
        for i, t in zip(self._at, tensors, strict=True):
            flat[i] = t
        return _whole(flat, self._spec)

    def gradients(self, gradients: Given) -> Any:
        """Return gradients in the structure of the input, None for entries without one."""
        flat: list[Any] = [None] * len(self._flat)
        for i, g in zip(self._at, gradients, strict=True):
            flat[i] = g
        return _whole(flat, self._spec)


class Made(NamedTuple):
    """Result of a model's call. outputs: those with a graph; at: their indices; score: which one is differentiated."""

    flat: list[Any]  # None in place of outputs with a graph
    spec: Any
    at: list[int]
    outputs: list[Tensor]
    score: int
    inputs: Sequence[Tensor]

    @staticmethod
    def of(output: Any, inputs: Sequence[Tensor], name: str) -> Made:
        """Describe the output of a model, an argument of that name, for the given inputs."""
        scores = scores_of(output, name)
        flat, spec = _flat(output)
        at = [i for i, u in enumerate(flat) if isinstance(u, Tensor) and u.requires_grad]
        outputs = [flat[i] for i in at]
        score = next((k for k, u in enumerate(outputs) if u is scores), None)
        if score is None:
            raise constant_scores(name)
        for i in at:
            flat[i] = None
        return Made(flat, spec, at, outputs, score, inputs)

    def filled(self, outputs: Sequence[Tensor]) -> Any:
        """Return the output of the model, with these tensors for those that have a graph."""
        flat = list(self.flat)
        for i, u in zip(self.at, outputs, strict=True):
            flat[i] = u
        return _whole(flat, self.spec)


known = Cache()
_tags: dict[Options, int] = {}
_native: Any = None


def native() -> Any:
    """Return the native part of this module; only where ``backends.program`` is loaded."""
    global _native
    if _native is None:
        others = surroundings(), uncompiled.native(), left_to_autograd.has, _tag
        _native = backends.program.Gradients(attributes(), CAPACITY, [REENTRANT, FROM_LOCAL], *others)
    return _native


def _tag(options: Options) -> int:
    """Number of options for programs, by which these are told apart."""
    return _tags.setdefault(options, len(_tags) + 1)


class Begun(NamedTuple):
    """What C++ could not finish. moved: the input that the model was called with; start: number of its first node."""

    output: Any
    moved: list[Tensor]
    start: int


def at_once(
    model: Callable[..., Any], x: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[Any, Any] | Begun | None:
    """Compute ``value_and_gradient`` in C++; None where the native path does not apply, or refuses the input."""
    if backends.program is None:
        return None
    found: Any = native().at_once(model, x, tuple(args), dict(kwargs or {}))
    return found if found is None or len(found) == 2 else Begun(*found)


def value_and_gradient(
    model: Callable[..., Any],
    inputs: Inputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str,
    any_order: bool = False,
    begun: Begun | None = None,
) -> tuple[Any, Any]:
    """Return the model's output, and the gradient of its summed scores at the inputs, in their structure.

    Where grad mode is on, both have a graph to the weights, and to the inputs that require gradients. any_order:
    whether it is to be differentiable more than once. begun: the model's call, if it was made.
    """
    graph, dual = torch.is_grad_enabled(), dual_level() >= 0
    for x in inputs.tensors if graph and not any_order else ():
        refuse_symbols(x)
    with torch.enable_grad():
        if begun is None:
            moved = [_moved(t, graph, dual) for t in inputs.tensors]
            start = 0 if backends.program is None else next_sequence_number()
            with uncompiled.uncompiled():
                output = model(inputs.filled(moved), *args, **kwargs)
        else:
            output, moved, start = begun
        made = Made.of(output, moved, name)
        del output, begun  # where results have no graph, it is freed while it is differentiated
        left = dual or any_order or backends.program is None or left_to_autograd.has(model, moved[0])
        found = (
            None if left or any(u.is_complex() for u in made.outputs) else _recorded(model, made, inputs, start, graph)
        )
        outputs, gradients = found or _by_engine(made, inputs, graph, name)
    return made.filled(outputs), inputs.gradients(gradients)


def _moved(x: Tensor, graph: bool, dual: bool) -> Tensor:
    """Return the input for the model: a view with the graph that it has, or a new leaf."""
    if x.requires_grad and graph:
        return x.view_as(x)
    return (x.view_as(x) if dual else x.detach()).requires_grad_()


def _by_engine(made: Made, source: Inputs, graph: bool, name: str) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Compute outputs and gradients by autograd's engine."""
    outputs, inputs = made.outputs, made.inputs
    if backends.program is not None and dual_level() < 0:
        found = native().by_engine(outputs, inputs, made.score, source.wanted, graph)
        if found is not None:
            return found[: len(outputs)], found[len(outputs) :]
    scores = outputs[made.score]
    prepare_graph([scores], inputs)
    ones = torch.ones_like(scores)
    gradients = torch.autograd.grad(scores, inputs, ones, create_graph=graph, allow_unused=True)
    if all(g is None for g in gradients):
        raise constant_scores(name)
    return outputs if graph else [_without_graph(u) for u in outputs], gradients


def _without_graph(x: Tensor) -> Tensor:
    """Detach a tensor, but keep its forward-mode tangent."""
    tangent = forward_ad.unpack_dual(x).tangent if dual_level() >= 0 else None
    return x.detach() if tangent is None else forward_ad.make_dual(x.detach(), tangent.detach())


def _recorded(
    model: Any, made: Made, source: Inputs, start: int, graph: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]] | None:
    """Compute outputs and gradients with this module's derivatives; None where autograd has to compute them."""
    outputs, inputs, wanted, count = made.outputs, made.inputs, source.wanted, len(made.outputs)
    found = native().gradient(outputs, inputs, made.score, wanted, start, graph)
    if type(found) is not tuple:
        return found and (found[:count], found[count:])
    key, leaves, places, saved, graph = found
    signature = known.get(
        key, lambda: Halves(_checked(outputs, start).key, made.score, places, wanted, rows_of(inputs), graph)
    )
    of: Halves = signature.known
    outsider: Any = None
    if of.generic:
        if not graph:  # nothing is saved on products
            native().keep(key, of, None, places, leaves, count)
            return None
        if of.plan.leaves_too_much():
            left_to_autograd.add(model, inputs[0].numel())
        ends = frozenset(i for i, call in enumerate(of.plan.calls) if call.leaf)
        outsider = Outsider(Graph(outputs, start).nodes, ends, again=True)
    values = [u.detach() for u in outputs]
    with torch.no_grad(), own_dtypes(inputs[0].device):
        results = list(signature.run([*values, *saved], of.pull, outsider or _nobody))
    if signature.native is not None and all(x is None or is_plain(x) for x in (*inputs, *leaves)):
        native().keep(key, of, signature.native, places, leaves, count)
    gradients = results[: len(inputs)]
    if not graph:
        return values, gradients
    held = of, outsider, values, gradients, [*saved, *results[len(inputs) :]]
    given = iter(Gradient.apply(held, *leaves))
    return [next(given) for _ in values], [None if g is None else next(given) for g in gradients]


def _checked(outputs: Sequence[Tensor], start: int) -> Graph:
    graph = Graph(outputs, start)
    prepare_nodes(graph.nodes, ())
    return graph


def rows_of(inputs: Sequence[Tensor]) -> int | None:
    """Return the batch size that all inputs share, or None."""
    sizes = [x.shape[0] if x.dim() else None for x in inputs]  # symbolic sizes have no hash
    return sizes[0] if sizes and all(n == sizes[0] for n in sizes) else None


def _nobody(what: Hashable, given: Given) -> Given:
    """Stand in for the outsider of a graph in which every call has a rule."""
    raise AssertionError(what)


class Gradient(Function):
    """Outputs of a model and gradients at its inputs, as a function of the leaves of the model's graph."""

    @staticmethod
    def forward(ctx: Any, held: Any, *leaves: Tensor | None) -> Any:
        ctx.known, ctx.outsider, values, gradients, tensors = held
        ctx.places = [i for i, g in enumerate(gradients) if g is not None]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return (*values, *(gradients[i] for i in ctx.places))

    @staticmethod
    def given(ctx: Any, cotangents: Given) -> list[Tensor | None]:
        """Return the cotangents of all outputs, then of the gradients at all inputs, with None for missing ones."""
        count = len(ctx.known.plan.outputs)
        at_gradients: list[Tensor | None] = [None] * len(ctx.known.places)
        for i, v in zip(ctx.places, cotangents[count:], strict=True):
            at_gradients[i] = v
        return [*cotangents[:count], *at_gradients]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(AGAIN)
        of: Halves = ctx.known
        given = Gradient.given(ctx, cotangents)
        tensors, outsider = ctx.saved_tensors, ctx.outsider
        if not graph_is_kept():
            ctx.outsider = None
        if all(c is None for c in given):
            return (None,) * (1 + of.plan.leaves)
        run = partial(of.finished, given, tensors, outsider)
        gradients, _ = run() if outsider is None else by_itself(run)
        return None, *gradients


class _Inside(Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], Any], results: list[Any], x: Tensor) -> Tensor:
        ctx.run, ctx.results = run, results
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        ctx.results.append(ctx.run())
        return None, None, None


def by_itself(run: Callable[[], Any]) -> Any:
    """Run a function that calls autograd's nodes in a backward pass of its own, and return its result.

    Inside another backward pass a node computes only the gradients that the pass asks for, and these nodes are not part
    of it. A pass that asks for no particular inputs computes all of them.
    """
    results: list[Any] = []
    with torch.enable_grad():
        started = _Inside.apply(run, results, torch.zeros((), requires_grad=True))
    started.backward()
    return results[0]
