"""What ran: the autograd graph of one forward pass of a critic, read once.

The critic is called as its author wrote it, and PyTorch's autograd, which sees every call that matters to a gradient,
keeps the graph: of what ran in Python, in C++ and in scripted parts alike. ``Graph`` holds its nodes in order with the
tensors that they saved. Its ``key`` is all that the passes depend on besides the values of those tensors: the
kinds of nodes, how they hang together, shapes, strides, dtypes, constants, and which leaves are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from gpkernels import backends
from gpkernels.critic.program import CAPACITY, watched
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Meta, Rule

DROPOUT = "NativeDropoutBackward0"
LEAF = "torch::autograd::AccumulateGrad"
GIVEN = "torch::autograd::Error"  # what AOTAutograd has behind the inputs of a graph that it traces
_WRAP = 1 << 64
Edge = tuple[Any, int]  # a node of autograd's graph and which of its outputs


class _Reader:
    """Reads what a rule wants of a node. ``attrgetter`` gives a tuple of two names and more."""

    def __init__(self, rule: type[Rule]) -> None:
        self.rule = rule
        self.saved = self._of([f"_saved_{name}" for name in rule.saved])
        self.constants = self._of([f"_saved_{name}" for name in rule.constants])

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
    """The nodes of autograd that outputs come from, parents before children.

    nodes: each with the output by which it was reached first. saved: the tensors that their rules read, one after the
    other. leaves: the tensors at which the graph ends; None for an output of an older node.
    key: (facts of each node, the place of each output's node and which of its outputs it is).
    """

    __slots__ = ("key", "leaves", "nodes", "saved")

    def __init__(self, outputs: Sequence[Tensor], start: int = 0) -> None:
        """start: the number of the first node that is the critic's own; older ones are where the graph ends."""
        self.saved: list[Tensor | None] = []
        self.leaves: list[Tensor | None] = []
        edges = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, outputs)]
        places: dict[Edge, int] = {}
        self.nodes = _in_order(edges, start, places)
        facts = tuple([self._read(edge, start, places) for edge in self.nodes])
        self.key = facts, tuple([(places[_name(edge, start)], edge[1]) for edge in edges])

    def _read(self, edge: Edge, start: int, places: Mapping[Edge, int]) -> tuple[Any, ...]:
        """The node's part of the key; its tensors are kept. An older node's output is a leaf without a tensor."""
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
        outputs = tuple([(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata])
        parents = tuple([None if p is None else (places[_name((p, nr), start)], nr) for p, nr in node.next_functions])
        reader = _READERS.get(name)
        if reader is None or (name == DROPOUT and not _trains(node)):
            return name, outputs, parents
        tensors = reader.saved(node)
        flat: list[Tensor | None] = []
        for x in tensors:
            flat.extend(x) if isinstance(x, (tuple, list)) else flat.append(x)
        # A Python number beside a tensor is saved as a tensor that PyTorch turns back into a number, a constant, where
        # calls are traced. A copy is none.
        self.saved += [x.detach().clone() if x is not None and not x.dim() and not watched() else x for x in flat]
        return name, outputs, parents, _hashable(reader.constants(node)), tuple([_meta(x) for x in flat])


def _trains(node: Any) -> bool:
    """Whether a dropout scales what it keeps, which only C++ can see."""
    return backends.program is not None and native().trains(node)


def _is_older(node: Any, start: int) -> bool:
    return bool(start) and node._sequence_nr() < start


def _name(edge: Edge, start: int) -> Edge:
    """A node, or one output of an older node."""
    return edge if _is_older(edge[0], start) else (edge[0], 0)


def _in_order(roots: Sequence[Edge], start: int, places: dict[Edge, int]) -> list[Edge]:
    """All nodes that roots lead to, parents first; ``places`` gets where each is."""
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


def _meta(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def _hashable(value: Any) -> Any:
    """A constant of a node; autograd gives negative numbers as large ones."""
    if isinstance(value, (tuple, list)):
        return tuple([_hashable(x) for x in value])
    return value - _WRAP if type(value) is int and value >= _WRAP // 2 else value


def rule_of(node: Any) -> tuple[Rule, tuple[Tensor, ...]]:
    """The rule of one node, and the tensors that it reads."""
    reader = _READERS[node.name()]
    inputs = [None if p is None else _full_meta(p._input_metadata[nr]) for p, nr in node.next_functions]
    constants = _hashable(reader.constants(node))
    return reader.rule(constants, inputs, [_full_meta(m) for m in node._input_metadata]), reader.saved(node)


def _full_meta(meta: Any) -> Meta:
    return Meta(tuple(meta.shape), meta.dtype, meta.device)


def attributes() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What is read of each kind of node: its tensors and its constants, by the names of attributes."""
    return {
        name: (tuple([f"_saved_{n}" for n in rule.saved]), tuple([f"_saved_{n}" for n in rule.constants]))
        for name, rule in RULES.items()
    }


_native: Any = None


def native() -> Any:
    """What reads graphs and finds programs in C++; ``backends.program`` tells whether that was built."""
    global _native
    if _native is None:
        _native = backends.program.Shelf(attributes(), CAPACITY)
    return _native
