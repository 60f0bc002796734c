"""What a graph gave for aliases of its inputs, as if it had been called with the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from gpkernels.compiler.replay import refuse_create_graph
from gpkernels.private import graph_is_kept


def connected(
    outputs: list[Any], aliases: list[Tensor], inputs: list[Tensor], leaves: list[int], adopted: list[int]
) -> list[Any]:
    """Return what a graph gave for aliases of its inputs, as if it had been called with these.

    leaves: which inputs require gradients; adopted: which came to do so, by what was written to them.
    """
    real = {id(alias): x for alias, x in zip(aliases, inputs, strict=True)}
    own = [aliases[k] for k in adopted]
    wholes = [_whole(x) if isinstance(x, Tensor) else None for x in outputs]
    ends = [x for x in wholes if x is not None and not x.is_leaf and id(x) not in real] + own
    if ends:
        ends = list({id(x): x for x in ends}.values())
        joined = _Bridged.apply(ends, [aliases[i] for i in leaves], *[inputs[i] for i in leaves])
        for x, y in zip(ends, joined, strict=True):
            real[id(x)] = _Adopted.apply(real[id(x)], y) if id(x) in real else y
    for x, whole in zip(outputs, wholes, strict=True):
        if whole is not None and id(whole) in real and id(x) not in real:
            real[id(x)] = x._view_func(real[id(whole)])
    return [real.get(id(x), x) for x in outputs]


def _whole(x: Tensor) -> Tensor:
    """Return the tensor that one is a view of, for autograd, or the tensor itself."""
    base = x._base
    return base if base is not None and base.requires_grad == x.requires_grad else x


class _Bridged(Function):
    """Outputs of a graph that ran on aliases of its inputs, connected to the inputs' autograd graph."""

    @staticmethod
    def forward(ctx: Any, outputs: list[Tensor], aliases: list[Tensor], *leaves: Tensor) -> Any:
        ctx.outputs, ctx.aliases = outputs, aliases
        ctx.set_materialize_grads(False)
        return tuple([x.detach() for x in outputs])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        refuse_create_graph()
        given = [(x, c) for x, c in zip(ctx.outputs, cotangents, strict=True) if c is not None]
        kept = not isinstance(ctx, BackwardCFunction) or graph_is_kept()  # not one: compiled autograd's proxy
        found = torch.autograd.grad(
            [x for x, _ in given], ctx.aliases, [c for _, c in given], retain_graph=kept, allow_unused=True
        )
        return None, None, *found


class _Adopted(Function):
    """An input to which the graph wrote something that requires a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return None, cotangent
