"""Replay of recorded lists, with their backward passes in autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from gpkernels.critic.deliver import deliver
from gpkernels.critic.program import Program
from gpkernels.private import is_batched, is_legacy_batched


class Lists:
    """Recorded calls of a graph. forward returns outputs, then gradients of a loss or tensors for backward."""

    def __init__(
        self, places: list[int], forward: Program, count: int, leaves: list[int], written: list[int], is_list: bool
    ) -> None:
        self.places, self.forward, self.count, self.leaves, self.written = places, forward, count, leaves, written
        self.is_list = is_list
        self.given: dict[int, int] = {}  # outputs that are inputs, by place
        self.known: tuple[int, list[int]] | None = None  # an output with precomputed gradients, and their inputs
        self.backward: list[Backward] = []

    def run(self, inputs: Sequence[Any]) -> Any:
        results: list[Any] = self.forward.run([inputs[i] for i in self.places], _nobody)
        outputs = results[: self.count]
        if self.written:
            increment_version([inputs[i] for i in self.written])
        if self.known is not None:
            place, leaves = self.known
            pairs = list(zip([inputs[i] for i in leaves], results[self.count :], strict=True))
            outputs[place] = deliver(outputs[place], pairs)
        for backward in self.backward:
            made = _Replayed.apply(backward, results, *[inputs[i] for i in self.leaves])
            for place, out in zip(backward.places, made, strict=True):
                outputs[place] = out
        for place, i in self.given.items():
            outputs[place] = inputs[i]
        return outputs if self.is_list else tuple(outputs)


class Backward(NamedTuple):
    """The backward pass of outputs that share a graph, which autograd frees at once."""

    places: list[int]  # of these outputs
    saved: list[int]  # places among the forward pass's results of what it needs
    strides: list[tuple[int, ...]]  # of the cotangents, for which calls were recorded
    whole: Program
    alone: list[Program]  # from each output alone, where there are several

    def gradients(self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the leaves, None where no output leads to one for which there is a cotangent."""
        given = [None if c is None else _laid_out(c, s) for c, s in zip(cotangents, self.strides, strict=True)]
        if all(c is not None for c in given):
            return _replayed(self.whole, [*saved, *given])
        passes = [_replayed(one, [*saved, c]) for one, c in zip(self.alone, given, strict=True) if c is not None]
        return [_sum([g for g in several if g is not None]) for several in zip(*passes, strict=True)]


def _sum(gradients: Sequence[Tensor]) -> Tensor | None:
    return sum(gradients[1:], gradients[0]) if gradients else None


def _replayed(program: Program, inputs: list[Any]) -> list[Tensor | None]:
    if any(is_batched(x) or is_legacy_batched(x) for x in inputs):
        return program.run_here(inputs)
    return program.run(inputs, _nobody)


def _nobody(name: Any, given: Any) -> Any:
    raise AssertionError("a list of a compiled graph has no untraced calls")


class _Replayed(Function):
    """Outputs whose backward pass replays a list."""

    @staticmethod
    def forward(ctx: Any, backward: Backward, results: list[Tensor], *leaves: Tensor) -> Any:
        ctx.own = backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[results[i] for i in backward.saved])
        return tuple([results[i] for i in backward.places])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        refuse_create_graph()
        return None, None, *ctx.own.gradients(ctx.saved_tensors, cotangents)


def refuse_create_graph() -> None:
    """Raise where gradients are to have a graph, which these have not: a loss of them would lack its gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'torch.compile with backend="gpkernels" does not support double backward (create_graph=True) through what '
            "it compiled; compute the gradient inside the compiled function, such as by gpkernels.input_gradient, or "
            "compile no part of it"
        )


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if is_batched(x) or is_legacy_batched(x):
        return x.contiguous()
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
