"""``torch.compile(step, backend="gpkernels")``: replay of a step's ATen calls, without code generation.

Dynamo traces and guards the step. The first run of its graph for given sizes records the ATen calls of forward and
backward; later runs replay the list in the native loop that also runs critics' passes, with neither Python nor autograd
between two calls. No code is generated, so compilation takes about a second.

A graph that cannot be recorded (it reads values back, returns views of its inputs, has complex numbers, changes shapes
in place, takes tensor subclasses, or branches by ``torch.cond``) runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpkernels import backends
from gpkernels.compiler.record import graphs_of, recorded
from gpkernels.compiler.replay import Lists
from gpkernels.critic.program import watched
from gpkernels.private import CHECKPOINT, CONTEXTS, HigherOrderOperator, dual_level

CAPACITY = 64  # input sizes per graph for which lists are kept


def as_program(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph of Dynamo's to lists of ATen calls: the backend "gpkernels" of ``torch.compile``.

    Args:
        graph: the traced graph.
        example_inputs: its inputs, some of them sizes where shapes are dynamic.

    Returns:
        A function from the inputs to the graph's outputs.

    Example:
        >>> step = torch.compile(lambda real, fake: loss(real, fake).loss, backend="gpkernels")
    """
    _keep_masks(graph)
    return _Graph(graph, example_inputs).run


def _keep_masks(graph: Any) -> None:
    """Make checkpointed regions repeat their random numbers in the backward pass, which Dynamo leaves to Inductor."""
    for one in graphs_of(graph):
        for node in one.graph.nodes:
            if isinstance(node.target, HigherOrderOperator) and node.target.name() == CHECKPOINT:
                node.target = _checkpointed
        one.recompile()


def _checkpointed(region: Any, *args: Any, **options: Any) -> Any:
    own = {"context_fn": region.meta[CONTEXTS]} if CONTEXTS in region.meta else {}
    return checkpoint(region, *args, **{**options, **own, "use_reentrant": False, "preserve_rng_state": True})


class _Graph:
    """A graph and its recorded lists, by the sizes of its inputs and the numbers that it reads from them."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.graph, self.dynamic = graph, any(not isinstance(x, Tensor) for x in inputs)
        self.as_it_is = any(isinstance(x, list) for x in inputs) or any(map(_has_to_run, graphs_of(graph)))
        self._lists: dict[Any, Lists | None] = {}
        self._reads: list[int] = []

    def run(self, *inputs: Any) -> Any:
        if self.as_it_is or backends.forced() is not None or watched() or dual_level() >= 0:
            return self.graph(*inputs)
        key = self._key(inputs)
        if key not in self._lists:
            if len(self._lists) >= CAPACITY:
                self._lists.clear()
            lists, outputs, reads = recorded(self.graph, inputs)
            if reads - set(self._reads):
                self._reads = sorted({*self._reads, *reads})
                self._lists.clear()
            self._lists[self._key(inputs)] = lists
            return outputs
        lists = self._lists[key]
        return self.graph(*inputs) if lists is None else lists.run(inputs)

    def _key(self, inputs: Sequence[Any]) -> Any:
        if not (self.dynamic or self._reads):
            return None
        return *[_sizes(x) for x in inputs], *[inputs[i].item() for i in self._reads]


def _has_to_run(graph: torch.fx.GraphModule) -> bool:
    """Whether a graph has to run: on its inputs, not on aliases of them, and with the backward pass that it has.

    Compiled autograd passes tensors in lists, which its graph empties, and stores gradients in its inputs. A region
    that is checkpointed selectively has one backward pass.
    """
    return CONTEXTS in graph.meta or any(str(node.target).endswith(".AccumulateGrad") for node in graph.graph.nodes)


def _sizes(x: Any) -> Any:
    return (x.shape, x.stride()) if isinstance(x, Tensor) else x
