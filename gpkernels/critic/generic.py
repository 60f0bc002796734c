"""Fallback for calls without a rule: each such call alone is differentiated by autograd.

Its VJP is the node of autograd's graph, called by itself; the derivatives of the VJP, which is linear in the
cotangents, are the JVP (by the cotangents) and the curvature (by the saved tensors). A custom function, a scripted part
or an operation without a rule costs what it costs in PyTorch; no other call does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from gpkernels.private import forward_class, set_grad_mode

Edge = tuple[Any, int]


def edge_of(x: Tensor) -> Edge:
    """Return the node and output number of a tensor; PyTorch's own function takes no sparse leaf."""
    if x.is_leaf and x.layout != torch.strided:
        with torch.enable_grad():
            found: Edge = x.clone().grad_fn.next_functions[0]  # type: ignore[union-attr]
        return found
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def fitted(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Reduce a gradient as autograd's engine does: summed over broadcast axes, cast to the right dtype."""
    shape = tuple(shape)
    if x.dim() != len(shape) or tuple(x.shape) != shape:
        extra = x.dim() - len(shape)
        spread = extra > 0 and tuple(x.shape[extra:]) == shape
        x = x.sum(list(range(extra))) if spread else x.sum_to_size(shape)
    return x if x.dtype == dtype else x.to(dtype)


def pull(node: Any, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Compute a node's VJP: the cotangents of each of its parents."""
    parents = node.next_functions
    if isinstance(node, BackwardCFunction):  # a custom function
        metas: Any = node._input_metadata  # type: ignore[attr-defined]
        given = [_or_zeros(c, meta) for c, meta in zip(cotangents, metas, strict=True)]
        results = _tuple(_apply(node, given))
        wanted = iter([r for r, need in zip(results, node.needs_input_grad, strict=False) if need])
        results = tuple([None if p is None else next(wanted, None) for p, _ in parents])
    else:
        results = _tuple(node(*cotangents))
    return [
        None if p is None or u is None else fitted(u, tuple(p._input_metadata[nr].shape), p._input_metadata[nr].dtype)
        for (p, nr), u in zip(parents, results, strict=True)
    ]


def _apply(node: Any, cotangents: Sequence[Tensor]) -> Any:
    """Call the backward of a custom function.

    ``torch.compile`` traces two graphs of a custom function. Its backward graph switches grad mode off, which is right
    for what the compiler differentiates once, and would be silently wrong here.
    """
    cls = forward_class(node)
    if cls.__name__ != "ApplyTemplate":
        return node.apply(*cotangents)
    backward = inspect.getclosurevars(cls.backward).nonlocals
    if "bwd" not in backward or "saved_values" not in backward:
        raise RuntimeError(
            "a custom autograd function cannot be differentiated twice in torch.compile here; declare it by "
            "torch.compiler.allow_in_graph, or leave the critic uncompiled"
        )
    return _Differentiably(backward["bwd"]).run(*cotangents, *backward["saved_values"])


class _Differentiably(torch.fx.Interpreter):
    """Interpreter of a graph that keeps the current grad mode."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None if target is set_grad_mode else super().call_function(target, args, kwargs)


def _tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _or_zeros(c: Tensor | None, meta: Any) -> Tensor:
    return torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device) if c is None else c


class Pullback:
    """A node's VJP at given cotangents, kept with its graph for one more derivative."""

    def __init__(self, node: Any, cotangents: Sequence[Tensor | None]) -> None:
        self.name = node.name()
        with torch.enable_grad():
            self.cotangents = [None if c is None else c.detach().requires_grad_() for c in cotangents]
            self.results = pull(node, self.cotangents)

    def values(self) -> list[Tensor | None]:
        return [None if r is None else r.detach() for r in self.results]

    def push(
        self, tangents: Sequence[Tensor | None], ends: Sequence[Edge], wanted: Sequence[Edge]
    ) -> list[Tensor | None]:
        """Map tangents of the parents to tangents of the outputs, then to the curvature at the requested edges."""
        pairs = [(r, t) for r, t in zip(self.results, tangents, strict=True) if r is not None and t is not None]
        pairs = [(r, t) for r, t in pairs if r.requires_grad]
        found: dict[Edge, Tensor] = {}
        for edge, g in _backward([r for r, _ in pairs], [t for _, t in pairs], {node for node, _ in ends}):
            found[edge] = found[edge] + g if edge in found else g
        out = [None if c is None else found.pop((edge_of(c)[0], 0), None) for c in self.cotangents]
        bent = [found.pop(edge, None) for edge in wanted]
        if found:
            raise RuntimeError(f"{self.name} depends on a tensor of the critic that is not among its arguments")
        return [*out, *bent]


class Outsider:
    """Makes the calls without a rule, of one graph.

    nodes: as the graph has them; leaves: which of them are leaves; again: whether tangents are pushed more than once.
    """

    def __init__(self, nodes: Sequence[Edge], leaves: frozenset[int] = frozenset(), again: bool = False) -> None:
        self.nodes, self._leaves, self._again = nodes, leaves, again
        self._pullbacks: dict[int, Pullback] = {}

    def __call__(self, what: tuple[Any, ...], given: Sequence[Tensor | None]) -> list[Tensor | None]:
        kind, i, *places = what
        node = self.nodes[i][0]
        if kind == "pull":
            return pull(node, given)
        if kind == "first":
            pullback = self._pullbacks[i] = Pullback(node, given)
            return pullback.values()
        # A leaf has the one output that the graph reaches.
        edges = [self.nodes[j] if j in self._leaves else (self.nodes[j][0], number) for j, number in places]
        pullback = self._pullbacks[i] if self._again else self._pullbacks.pop(i)
        return pullback.push(given, self.nodes, edges)


def _backward(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], ends: set[Any]) -> list[tuple[Edge, Tensor]]:
    """Differentiate a small graph by hand, as far as the nodes in ``ends`` and leaves.

    ``autograd.grad`` would continue through the critic's own graph, from one recorded value to another.
    """
    ready: dict[Any, dict[int, Tensor]] = {}
    found: list[tuple[Edge, Tensor]] = []

    def give(node: Any, nr: int, g: Tensor) -> None:
        if node in ends or not node.next_functions:
            found.append(((node, nr), g))
            return
        slots = ready.setdefault(node, {})
        slots[nr] = slots[nr] + g if nr in slots else g

    roots = [edge_of(x) for x in outputs]
    order = _order([node for node, _ in roots], ends)
    with torch.no_grad():
        for (node, nr), cotangent in zip(roots, cotangents, strict=True):
            give(node, nr, cotangent)
        for node in order:
            slots = ready.pop(node, None)
            if slots is None:
                continue
            results = pull(node, [slots.get(i) for i in range(len(node._input_metadata))])
            for (parent, nr), g in zip(node.next_functions, results, strict=True):
                if parent is not None and g is not None:
                    give(parent, nr, g)
    return found


def _order(roots: Sequence[Any], ends: set[Any]) -> list[Any]:
    """Sort the nodes of a small graph topologically, outputs first."""
    done: dict[Any, None] = {}
    stack = [(node, False) for node in roots]
    while stack:
        node, seen = stack.pop()
        if node in done or node in ends:
            continue
        if seen:
            done[node] = None
            continue
        stack.append((node, True))
        stack += [(p, False) for p, _ in node.next_functions if p is not None]
    return list(reversed(done))
