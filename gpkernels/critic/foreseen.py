"""Whether several groups of samples may go as one batch inside ``torch.compile``: learnt while the compiler traces.

What the compiler has traced of the critic's call is made once more on tensors without values, watched as a call outside
is. If nothing speaks against one batch, the trace begins anew with all samples in one, and its calls are held against
those that were watched. A trace has no effects, so the critic is called as often as its graph says, and each
compilation learns for itself: what changed in the critic changes what is traced.
"""

from __future__ import annotations

import warnings
from functools import cache
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
from gpkernels.private import HigherOrderOperator, compiler_lacks, restart_of_trace


class Foreseen:
    """What a trace has learnt. log: the watched calls, None where the groups go apart; rows: of a group."""

    def __init__(self, log: Log | None, rows: int) -> None:
        self.log, self.rows = log, rows
        self.held = False  # whether a trace as one batch has been held against it


class _Now(local):
    """The trace at work in this thread."""

    seen: Seen | None
    last: Any = None  # the graph's last node before the critic was called


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
    # What is made by the traced function itself is made anew in each trace, and is no more than its class in this one.
    _now.seen = seen if hasattr(seen, "outlives_traces") else None
    return seen.traced is not None and seen.traced.log is not None


def begins(ctx: Any) -> None:
    """Mark where the critic's call begins in the graph."""
    _now.last = next(reversed(ctx.graph().nodes))


def learns(ctx: Any) -> None:
    """Look at a call with one group alone, whose locals are ``x`` and ``scores``; begin anew where one batch may do."""
    seen, x = _now.seen, ctx.get_local("x").as_fake()
    if seen is not None and seen.traced is None:
        log = _watched(ctx, x)
        seen.traced = Foreseen(log, int(x.shape[0]) if log is not None else 0)
        if log is not None:
            raise restart_of_trace()


def holds(ctx: Any) -> None:
    """Hold a call with all groups against what was watched; begin anew, apart, where they differ."""
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
        # What was learnt for an earlier compilation is learnt anew, but for this one.
        seen.traced = None if known.held else Foreseen(None, 0)
        raise restart_of_trace() from None
    known.held = True


def _watched(ctx: Any, x: Tensor) -> Log | None:
    """The calls of the critic, where no sample meets another."""
    if type(x.shape[0]) is not int:  # sizes that are not known could be anywhere
        return None
    watch = Watch()
    watch.follow(x)
    scores = _made(ctx, watch)
    found = None if scores is None else _laid_out(scores, x)
    if found is None:
        return None
    plan, graph = found
    if sum(u.nbytes for u in graph.saved if u is not None) > LARGE[x.device.type == "cpu"]:
        return None  # one batch gains nothing
    return settled(watch, plan, graph.nodes)


def _laid_out(scores: Tensor, x: Tensor) -> tuple[Plan, Graph] | None:
    """The plan of a graph in which no sample meets another, and the graph."""
    if not scores.requires_grad:
        return None
    graph = Graph([scores])
    leaf = next((i for i, found in enumerate(graph.leaves) if found is x), None)
    if leaf is None:
        return None
    plan = Plan(graph.key, leaf, False, x.shape[0], 0)
    return None if keeps_apart(plan, plan.outputs[0][0]) is not None else (plan, graph)


def _made(ctx: Any, mode: Any) -> Tensor | None:
    """The scores, from the critic's calls made once more in a mode; None where they cannot be made a second time."""
    found: dict[Any, Any] = {}

    def value(node: Any) -> Any:
        return found[node] if node in found else node.meta["example_value"]

    scores = ctx.get_local("scores").as_proxy().node
    nodes = list(ctx.graph().nodes)
    nodes = nodes[nodes.index(_now.last) + 1 :]
    if any(isinstance(node.target, HigherOrderOperator) for node in nodes):
        return None
    try:
        with ctx.get_local("x").as_fake().fake_mode, torch.enable_grad(), mode:
            for node in nodes:
                args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
                if node.op == "call_function":
                    found[node] = node.target(*args, **kwargs)
                elif node.op == "call_method":
                    found[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        return value(scores)
    except Exception:  # the critic's own were raised when its calls were traced
        return None
