"""Autograd's graph of one forward pass of a critic, read once.

Autograd records every call that matters to a gradient, whether it ran in Python, in C++ or in scripted parts. ``Graph``
holds the nodes in topological order with their saved tensors. Its ``key`` is everything that the passes depend on
besides the values of those tensors: kinds of nodes, edges, shapes, strides, dtypes, constants, and the leaves that are
trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from gpkernels import backends
from gpkernels.critic import uncompiled
from gpkernels.critic.program import CAPACITY, watched
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Meta, Rule
from gpkernels.private import (
    FROM_LOCAL,
    REENTRANT,
    call_again,
    is_reentrant_checkpoint,
    local_gradient,
    local_placements,
)

DROPOUT = "NativeDropoutBackward0"
LEAF = "torch::autograd::AccumulateGrad"
GIVEN = "torch::autograd::Error"  # node of a graph input while AOTAutograd traces
_WRAP = 1 << 64
Edge = tuple[Any, int]  # (node, output number)


class _Reader:
    """Reads the saved tensors and constants that a rule declares."""

    def __init__(self, rule: type[Rule]) -> None:
        self.rule = rule
        self.saved = self._of([f"_saved_{name}" for name in rule.saved])
        self.constants = self._of([f"_saved_{name}" for name in rule.constants])

    def all_constants(self, node: Any, saved: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Return the constants of a node in a hashable form, whose saved tensors were read."""
        constants: tuple[Any, ...] = _hashable(self.constants(node))
        return (*constants, index_by_row(saved)) if self.rule.indexes else constants

    @staticmethod
    def _of(names: Sequence[str]) -> Any:
        if len(names) > 1:
            return attrgetter(*names)
        if names:
            one = attrgetter(names[0])
            return lambda node: (one(node),)
        return lambda node: ()


_READERS = {name: _Reader(rule) for name, rule in RULES.items()}


class Graph:
    """Autograd's nodes that the outputs depend on, parents before children.

    nodes: each with the output by which it was first reached. saved: the tensors that rules read, concatenated. leaves:
    the tensors at which the graph ends; None for an output of an older node. key: (facts of each node, (index of each
    output's node, output number)).
    """

    __slots__ = ("key", "leaves", "nodes", "saved")

    def __init__(self, outputs: Sequence[Tensor], start: int = 0) -> None:
        """Read the graph; nodes with a sequence number below ``start`` end it, as leaves."""
        self.saved: list[Tensor | None] = []
        self.leaves: list[Tensor | None] = []
        edges = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, outputs)]
        places: dict[Edge, int] = {}
        self.nodes = _in_order(edges, start, places)
        facts = tuple([self._read(edge, start, places) for edge in self.nodes])
        self.key = facts, tuple([(places[_name(edge, start)], edge[1]) for edge in edges])

    def _read(self, edge: Edge, start: int, places: Mapping[Edge, int]) -> tuple[Any, ...]:
        """Return the node's part of the key and keep its tensors. An older node's output is a leaf without a tensor."""
        node, number = edge
        if _is_older(node, start):
            self.leaves.append(None)
            meta = node._input_metadata[number]
            return LEAF, ((tuple(meta.shape), None, meta.dtype, meta.device),)
        name = node.name()
        if name == LEAF:
            variable = node.variable
            self.leaves.append(variable)
            return name, (_meta(variable),)
        if name == GIVEN:
            self.leaves.append(None)
            meta = node._input_metadata[0]
            return LEAF, ((tuple(meta.shape), None, meta.dtype, meta.device),)
        if any(m.is_nested_tensor for m in node._input_metadata):
            raise RuntimeError(
                "critic: a penalty of nested tensors is not supported; pad them to one length, and mask what is padded"
            )
        outputs = tuple([(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata])
        parents = tuple([None if p is None else (places[_name((p, nr), start)], nr) for p, nr in node.next_functions])
        reader = _READERS.get(name)
        if reader is None or (name == DROPOUT and not _trains(node)):
            return name, outputs, parents
        tensors = reader.saved(node)
        flat: list[Tensor | None] = []
        for x in tensors:
            flat.extend(x) if isinstance(x, (tuple, list)) else flat.append(x)
        if any(x is not None and x.layout != torch.strided for x in flat):  # no rule knows calls with sparse tensors
            return name, outputs, parents
        self.saved += flat if watched() else map(_alone, flat)
        return name, outputs, parents, reader.all_constants(node, flat), tuple([_meta(x) for x in flat])


def _alone(x: Tensor | None) -> Tensor | None:
    """Return a saved tensor without the graph that it comes from, which would be held, and all that it has saved."""
    if x is None or (x.is_leaf and x.dim()):
        return x
    # A Python number among the operands is saved as a wrapped number, which tracing would turn into a constant; a copy
    # is an ordinary tensor.
    return x.detach() if x.dim() else x.detach().clone()


def _trains(node: Any) -> bool:
    """Whether a dropout is in training mode, which only C++ can read from its node."""
    return backends.program is not None and native().trains(node)


def _is_older(node: Any, start: int) -> bool:
    return bool(start) and node._sequence_nr() < start


def _name(edge: Edge, start: int) -> Edge:
    """Identity of a node, or of one output of an older node."""
    return edge if _is_older(edge[0], start) else (edge[0], 0)


def _in_order(roots: Sequence[Edge], start: int, places: dict[Edge, int]) -> list[Edge]:
    """Sort all nodes that roots depend on, parents first; ``places`` receives the index of each."""
    order: list[Edge] = []
    stack = list(roots)
    while stack:
        edge = stack[-1]
        name = _name(edge, start)
        if name in places:
            stack.pop()
            continue
        parents = () if _is_older(edge[0], start) else edge[0].next_functions
        pending = [p for p in parents if p[0] is not None and _name(p, start) not in places]
        if pending:
            stack += pending
            continue
        places[name] = len(order)
        order.append(edge)
        stack.pop()
    return order


def read_unfolded(outputs: Sequence[Tensor], start: int = 0) -> tuple[Graph, bool]:
    """Read the graph with what reentrant checkpoints call in their place; return whether there were any.

    Rules alone may differentiate it then: what autograd's nodes have saved still leads to the checkpoints.
    """
    graph, any_found = Graph(outputs, start), False
    while _unfold(outputs, graph):  # functions may have checkpoints of their own
        graph, any_found = Graph(outputs, start), True
    return graph, any_found


def _unfold(outputs: Sequence[Tensor], graph: Graph) -> bool:
    facts, _ = graph.key
    found = [node for (node, _), (name, *_) in zip(graph.nodes, facts, strict=True) if name == REENTRANT]
    if not found or backends.program is None or not all(map(is_reentrant_checkpoint, found)):
        return False
    with uncompiled.uncompiled():
        backends.program.replace_nodes(outputs, REENTRANT, [(node, list(call_again(node))) for node in found])
    return True


def reentrant() -> RuntimeError:
    """Return the error of a checkpoint that cannot be replaced."""
    return RuntimeError(
        "critic: torch.utils.checkpoint with use_reentrant=True has no second derivative, and its backward changes the "
        "gradients of weights; use use_reentrant=False"
    )


def prepare_graph(outputs: Sequence[Tensor], samples: Sequence[Tensor]) -> None:
    """Call ``prepare_nodes`` with the nodes that the outputs depend on."""
    prepare_nodes(_in_order([(edge.node, edge.output_nr) for edge in map(get_gradient_edge, outputs)], 0, {}), samples)


def prepare_nodes(nodes: Sequence[Edge], samples: Sequence[Tensor]) -> bool:
    """Make the nodes differentiable twice, and return whether that took hooks. samples: whose gradients are wanted.

    Raises RuntimeError where PyTorch's second derivative would be wrong without an error.
    """
    named: dict[str, list[Any]] = {REENTRANT: [], FROM_LOCAL: []}
    for node, _ in nodes:
        named.get(node.name(), []).append(node)
    if named[REENTRANT]:
        raise reentrant()
    if not (named[FROM_LOCAL] and samples):
        return False
    ends = {get_gradient_edge(x).node for x in samples}
    for node in named[FROM_LOCAL]:
        placements = local_placements(node)
        if node.next_functions[0][0] in ends and any(place.is_shard() and place.dim > 0 for place in placements):
            raise RuntimeError(
                "critic: expected whole samples on each process, got DTensor.from_local(samples, "
                f"placements={placements}); replicate them, as the norm of a part is not that of the whole"
            )
        node.register_hook(local_gradient(node))
    return True


def index_by_row(indices: Sequence[Tensor | None]) -> bool:
    """Whether the first index counts the rows and the others have a number for each; False where a device has them."""
    first, *others = indices
    if type(first) is not Tensor or first.device.type != "cpu" or first.dtype != torch.int64 or first.dim() != 1:
        return False
    if any(x is not None and (x.dtype != torch.int64 or x.shape != first.shape) for x in others):
        return False
    return torch.equal(first, torch.arange(len(first)))


def _meta(x: Tensor | None) -> Any:
    if x is None:
        return None
    return x.shape, x.stride() if x.layout == torch.strided else x.layout, x.dtype, x.device


def _hashable(value: Any) -> Any:
    """Make a constant of a node hashable; autograd returns negative integers as unsigned."""
    if isinstance(value, (tuple, list)):
        return tuple([_hashable(x) for x in value])
    return value - _WRAP if type(value) is int and value >= _WRAP // 2 else value


def rule_of(node: Any) -> tuple[Rule, tuple[Tensor, ...]]:
    """Return the rule of one node, and the saved tensors that it reads."""
    reader = _READERS[node.name()]
    inputs = [None if p is None else _full_meta(p._input_metadata[nr]) for p, nr in node.next_functions]
    saved = reader.saved(node)
    constants = reader.all_constants(node, saved[0] if reader.rule.indexes else saved)
    return reader.rule(constants, inputs, [_full_meta(m) for m in node._input_metadata]), saved


def _full_meta(meta: Any) -> Meta:
    return Meta(tuple(meta.shape), meta.dtype, meta.device)


def attributes() -> dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]]:
    """Return what is read of each kind of node: saved tensors, constants, and whether the tensors index by row."""
    return {
        name: (tuple([f"_saved_{n}" for n in rule.saved]), tuple([f"_saved_{n}" for n in rule.constants]), rule.indexes)
        for name, rule in RULES.items()
    }


_native: Any = None


def native() -> Any:
    """Return the native graph reader and program cache; only where ``backends.program`` is loaded."""
    global _native
    if _native is None:
        _native = backends.program.Shelf(attributes(), CAPACITY, uncompiled.native())
    return _native
