"""What ran: the autograd graph of one forward pass of a critic, read once.

The critic is called as its author wrote it, and PyTorch's autograd, which sees every call that matters to a gradient,
keeps the graph: in Python, in C++, in scripted and compiled parts alike. ``Graph`` holds its nodes in order of execution
with the tensors that they saved. Its ``key`` is all that the passes depend on besides the values of those tensors: the
kinds of nodes, how they hang together, shapes, strides, dtypes, constants, and which leaves are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from gpkernels import backends
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Meta, Rule

LEAF = "torch::autograd::AccumulateGrad"
_WRAP = 1 << 64


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

    saved: the tensors that the nodes' rules read, one after the other. leaves: the tensors at which the graph ends.
    key: (facts of each node, the place of each output's node and which of its outputs it is).
    """

    __slots__ = ("nodes", "saved", "leaves", "key")

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.saved: list[Tensor | None] = []
        self.leaves: list[Tensor] = []
        edges = [get_gradient_edge(x) for x in outputs]
        places: dict[Any, int] = {}
        self.nodes = _in_order([edge.node for edge in edges], places)
        facts = tuple([self._read(node, places) for node in self.nodes])
        self.key = facts, tuple([(places[edge.node], edge.output_nr) for edge in edges])

    def _read(self, node: Any, places: Mapping[Any, int]) -> tuple[Any, ...]:
        """The node's part of the key; its tensors are kept."""
        name = node.name()
        if name == LEAF:
            variable = node.variable
            self.leaves.append(variable)
            return name, (_meta(variable),)
        outputs = tuple([(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata])
        parents = tuple([None if p is None else (places[p], nr) for p, nr in node.next_functions])
        reader = _READERS.get(name)
        if reader is None:
            return name, outputs, parents
        tensors = reader.saved(node)
        flat: list[Tensor | None] = []
        for x in tensors:
            flat.extend(x) if isinstance(x, (tuple, list)) else flat.append(x)
        self.saved += flat
        return name, outputs, parents, _hashable(reader.constants(node)), tuple([_meta(x) for x in flat])


def _in_order(roots: Iterable[Any], places: dict[Any, int]) -> list[Any]:
    """All nodes that roots lead to, parents first; ``places`` gets where each is."""
    nodes: list[Any] = []
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in places:
            stack.pop()
            continue
        pending = [p for p, _ in node.next_functions if p is not None and p not in places]
        if pending:
            stack += pending
            continue
        places[node] = len(nodes)
        nodes.append(node)
        stack.pop()
    return nodes


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


_native: Any = None


def read(outputs: list[Tensor]) -> tuple[Any, list[Any], list[Tensor | None], list[Tensor]]:
    """(key, nodes, saved, leaves) of a graph; the key is the graph's own, or bytes that tell the same."""
    global _native
    if backends.program is None:
        graph = Graph(outputs)
        return graph.key, graph.nodes, graph.saved, graph.leaves
    if _native is None:
        attributes = {
            name: tuple([tuple([f"_saved_{n}" for n in names]) for names in (rule.saved, rule.constants)])
            for name, rule in RULES.items()
        }
        _native = backends.program.Reader(attributes)
    return _native(outputs)  # type: ignore[no-any-return]
