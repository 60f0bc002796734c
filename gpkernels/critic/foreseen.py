"""Batching of several groups of samples inside ``torch.compile``, decided while Dynamo traces.

The traced calls of the critic are run once more on fake tensors under ``together.Watch``. If nothing rules out one
batch, the trace restarts with all samples in one, and its calls are compared with the recorded ones. A trace has no
effects, so the critic is called as often as its graph says, and each compilation decides anew.
"""

from __future__ import annotations

import warnings
from functools import cache
from math import prod
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.compiler import assume_constant_result
from torch.fx.node import map_arg

from gpkernels.critic.graph import Graph
from gpkernels.critic.plan import Plan
from gpkernels.critic.step import LARGE
from gpkernels.critic.together import Check, Differs, Log, Seen, Watch, keeps_apart, settled
from gpkernels.private import HigherOrderOperator, compiler_lacks, enable_python_dispatcher, restart_of_trace


class Foreseen:
    """Result of a trace. log: the recorded calls, None where groups stay separate; rows: samples per group."""

    def __init__(self, log: Log | None, rows: int) -> None:
        self.log, self.rows = log, rows
        self.held = False  # whether a batched trace has matched it


class _Now(local):
    """State of the current trace, per thread."""

    seen: Seen | None
    last: Any = None  # the graph's last node before the critic's call


_now = _Now()


@assume_constant_result
def foresees() -> bool:
    """Whether this version of the compiler can be asked; a warning says so once where it cannot."""
    lacking = tuple(compiler_lacks())
    if lacking:
        _warn(lacking)
    return not lacking


@cache
def _warn(lacking: tuple[str, ...]) -> None:
    warnings.warn(
        f"PyTorch {torch.__version__} has no {', '.join(lacking)}: in torch.compile, groups of samples go through the "
        "critic one after the other",
        stacklevel=2,
    )


@assume_constant_result
def as_one(seen: Seen) -> bool:
    """Whether to trace all groups as one batch."""
    # An object that the traced function itself creates is created anew in each trace, and is only its class in this
    # one.
    _now.seen = seen if hasattr(seen, "outlives_traces") else None
    return seen.traced is not None and seen.traced.log is not None


def begins(ctx: Any) -> None:
    """Mark the start of the critic's call in the graph."""
    _now.last = next(reversed(ctx.graph().nodes))


def learns(ctx: Any) -> None:
    """Inspect a call with one group, with locals ``x`` and ``scores``; restart the trace if one batch is possible."""
    seen, x = _now.seen, ctx.get_local("x").as_fake()
    if seen is not None and seen.traced is None:
        log = _watched(ctx, x)
        seen.traced = Foreseen(log, int(x.shape[0]) if log is not None else 0)
        if log is not None:
            raise restart_of_trace()


def holds(ctx: Any) -> None:
    """Compare a batched call with the recorded calls; restart the trace with separate groups if they differ."""
    seen, x = _now.seen, ctx.get_local("x").as_fake()
    assert seen is not None
    known = seen.traced
    assert known.log is not None
    check = Check(known.log, known.rows, x.shape[0]) if type(x.shape[0]) is int else None
    try:
        scores = None if check is None else _made(ctx, check)
        if check is None or scores is None or _laid_out(scores, x) is None:
            raise Differs
        check.finish()
    except Differs:
        # A result of an earlier compilation is discarded; one of this compilation settles that groups stay separate.
        seen.traced = None if known.held else Foreseen(None, 0)
        raise restart_of_trace() from None
    known.held = True


def _watched(ctx: Any, x: Tensor) -> Log | None:
    """Record the critic's calls, if samples are independent of each other."""
    if any(type(n) is not int for n in x.shape):  # symbolic sizes could occur anywhere
        return None
    watch = Watch()
    watch.follow(x)
    scores = _made(ctx, watch)
    found = None if scores is None else _laid_out(scores, x)
    if found is None:
        return None
    plan, graph = found
    sizes = [prod(u.shape) * u.element_size() for u in graph.saved if u is not None]  # strides may be symbolic
    if sum(sizes) > LARGE[x.device.type == "cpu"]:
        return None  # batching does not pay
    return settled(watch, plan, graph.nodes)


def _laid_out(scores: Tensor, x: Tensor) -> tuple[Plan, Graph] | None:
    """Return the plan and the graph of scores whose samples are independent, else None."""
    if not scores.requires_grad:
        return None
    graph = Graph([scores])
    leaf = next((i for i, found in enumerate(graph.leaves) if found is x), None)
    if leaf is None:
        return None
    plan = Plan(graph.key, {leaf: False}, x.shape[0], 0)
    return None if keeps_apart(plan, plan.outputs[0][0]) is not None else (plan, graph)


def _made(ctx: Any, mode: Any) -> Tensor | None:
    """Replay the critic's traced calls under a mode and return the scores; None where they cannot be replayed."""
    found: dict[Any, Any] = {}

    def value(node: Any) -> Any:
        return found[node] if node in found else node.meta["example_value"]

    scores = ctx.get_local("scores").as_proxy().node
    nodes = list(ctx.graph().nodes)
    nodes = nodes[nodes.index(_now.last) + 1 :]
    if any(isinstance(node.target, HigherOrderOperator) for node in nodes):
        return None
    try:
        with ctx.get_local("x").as_fake().fake_mode, enable_python_dispatcher(), torch.enable_grad(), mode:
            for node in nodes:
                args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
                if node.op == "call_function":
                    found[node] = node.target(*args, **kwargs)
                elif node.op == "call_method":
                    found[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        return value(scores)
    except Exception:  # errors of the critic itself were raised when it was traced
        return None
