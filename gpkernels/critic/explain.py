"""How each call of a critic is differentiated in a penalty, and why: `gpkernels explain`.

The report is derived from what the passes read, autograd's graph of one call of the critic. The critic is called once
more, with hooks on the modules and a mode that observes each function, to attribute the graph's nodes to layers and
functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from gpkernels.critic.call import scores_of
from gpkernels.critic.explanation import Call, Explanation
from gpkernels.critic.follow import Claim, Flops, Follow, modules_of, names_of, restored
from gpkernels.critic.generic import Edge, Outsider
from gpkernels.critic.graph import Graph, read_unfolded
from gpkernels.critic.parts import Norm, Task, constant_scores
from gpkernels.critic.plan import Plan
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Unfit
from gpkernels.critic.step import penalty_on_gradient
from gpkernels.critic.together import Watch, keeps_apart, settled
from gpkernels.critic.uncompiled import uncompiled
from gpkernels.ops.checks import check_batch, check_callable

_KINDS = {
    "CompiledFunctionBackward": "it is compiled",
    "DifferentiableGraphBackward": "it is scripted",
    "CopySlices": "it writes into a slice of a tensor",
}
_FUSED_ATTENTION = "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) chooses attention that can"


def explain(critic: Callable[..., Any], example: Tensor) -> Explanation:
    """Report how each call of a critic is differentiated in a penalty, and what the penalty costs.

    The critic is called on the example; its buffers and the state of the random number generators are restored.

    Args:
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with scores first.
        example (Tensor): a batch as the critic is called with in training. Its values do not matter.

    Shape:
        - example: :math:`(N, *)`
        - scores: any shape, of fewer than :math:`N` elements where a score belongs to several samples

    Returns:
        Explanation: the calls in order, whether samples are independent of each other, and the FLOPs of a penalty here
        and in eager PyTorch. ``print`` shows it as a table.

    Raises:
        TypeError: the critic cannot be called or returns no tensor, or the example is not a dense floating-point
            tensor.
        ValueError: the example is not a batch, or the scores do not depend on it.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> explanation = gpkernels.explain(critic, torch.randn(8, 2))
        >>> [call.function for call in explanation.calls]
        ['linear', 'tanh', 'linear']
    """
    check_batch("example", example)
    check_callable("critic", critic)
    with torch.enable_grad():
        return _Explainer(critic, example).explanation()


class _Explainer:
    """Calls the critic repeatedly, restoring its state each time."""

    def __init__(self, critic: Callable[..., Any], example: Tensor) -> None:
        self.critic, self.example = critic, example
        self.modules = dict(modules_of(critic))
        with self._restored():
            self._scores()  # scripted parts have their final graph from the second call on
        with self._restored():
            x, scores = self._scores()
            self.pooled = scores.numel() < len(x)
            graph = _graph_of(scores)
            self.names = [node.name() for node, _ in graph.nodes]
            self.plan = _planned(graph, x)
            # Determined before the buffers are restored, since nodes may have saved them.
            generic = (i for i, c in enumerate(self.plan.calls) if c.moves and c.rule is None and not c.leaf)
            self.generic = {i: self._why_generic(i, graph.nodes) for i in generic}

    def explanation(self) -> Explanation:
        with self._restored(), uncompiled(), Flops() as forward:
            self._scores()
        calls, rows = self._calls()
        eager, eager_refusal = self._counted(self._eager_penalty)
        ours, refusal = self._counted(self._penalty)
        samples, meet = self._samples(calls, rows)
        return Explanation(
            calls, _way(calls), samples, meet, forward.total, eager, ours, eager_refusal, refusal, forward.uncounted
        )

    def _scores(self) -> tuple[Tensor, Tensor]:
        """Return a new batch and the critic's scores of it."""
        x = self.example.detach().requires_grad_()
        return x, scores_of(self.critic(x))

    def _restored(self) -> AbstractContextManager[None]:
        return restored(self.modules.values(), self.example.device)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _calls(self) -> tuple[list[Call], dict[int, int]]:
        """Return the calls, and the index of the call of each node of the graph."""
        claims, has_flops = self._claims()
        members: dict[Any, list[int]] = {}
        for i, call in enumerate(self.plan.calls):
            if call.moves and not call.leaf:
                claim = claims[i]
                # A node that is attributed to no function has a line of its own.
                key = (claim, -1) if claim is not None and claim.function else (claim, i)
                members.setdefault(key, []).append(i)
        order = sorted(members, key=lambda key: (-1 if key[0] is None else key[0].number, key[1]))
        calls: list[Call] = []
        rows: dict[int, int] = {}
        counted: set[int] = set()
        for key in order:
            claim, places = key[0], members[key]
            name = claim.function if claim is not None and claim.function else _short(self.plan.calls[places[0]].name)
            flops = claim.flops if claim is not None and id(claim) not in counted else 0
            counted.add(id(claim))
            rows.update(dict.fromkeys(places, len(calls)))
            layer = "" if claim is None else claim.layer
            calls.append(Call(layer, name, self._way_of(places), flops if has_flops else None))
        return calls, rows

    def _claims(self) -> tuple[list[Claim | None], bool]:
        """Return the origin of each node, and whether FLOPs could be attributed.

        Compiled parts do not run as such under modes; for them the layers are found by hooks alone.
        """
        wanted = [_alike(name) for name in self.names]
        for functions, flops in ((True, True), (True, False), (False, False)):
            follow = Follow(names_of(self.modules))
            try:
                with self._restored(), follow.modes(functions, flops), follow.hooks():
                    _, scores = self._scores()
                    follow.claim(scores)
                    nodes = [node for node, _ in _graph_of(scores).nodes]
            except Exception:  # not the critic's, which has run without modes and hooks
                continue
            if [_alike(node.name()) for node in nodes] == wanted:
                return [follow.claims.get(node) for node in nodes], flops
        return [None] * len(wanted), False

    def _way_of(self, places: Sequence[int]) -> str:
        """Describe how a call that made these nodes is differentiated."""
        calls = [self.plan.calls[i] for i in places]
        reasons = dict.fromkeys(self.generic[i] for i in places if i in self.generic)
        if reasons:
            return "generic: left to autograd, " + "; ".join(reasons)
        return "rule, curved" if any(call.curved for call in calls) else "rule"

    def _why_generic(self, i: int, nodes: Sequence[Edge]) -> str:
        call = self.plan.calls[i]
        name, rule = call.name.rpartition("::")[2], RULES.get(call.name)
        why = f"there is no rule for {name}"
        if name in _KINDS:
            why = _KINDS[name]
        elif isinstance(nodes[i][0], BackwardCFunction):
            why = f"it is a custom function ({name})"
        elif rule is not None:
            try:
                rule(call.constants, self.plan.metas(call), call.outputs)
            except Unfit as reason:
                why = f"the rule for {name} is not for this case" + (f" ({reason})" if str(reason) else "")
        refusal = self._refusal(i, nodes)
        if not refusal:
            return why
        cure = f"; {_FUSED_ATTENTION}" if "ScaledDotProduct" in call.name else ""
        return f"{why}, and PyTorch cannot differentiate it twice: {refusal}{cure}"

    def _refusal(self, i: int, nodes: Sequence[Edge]) -> str:
        """Return PyTorch's error for a node without a second derivative, otherwise ""."""
        call, outsider = self.plan.calls[i], Outsider(nodes)
        try:
            with torch.no_grad():
                ones = [torch.ones(m.shape, dtype=m.dtype, device=m.device) for m in call.outputs]
                found = outsider(("first", i), ones)
                moving = [p is not None and self.plan.calls[p[0]].moves for p in call.parents]
                tangents = [
                    torch.ones_like(u) if m and u is not None else None for u, m in zip(found, moving, strict=True)
                ]
                outsider(("push", i), tangents)
        except Exception as error:  # a user's function may raise anything
            return _first_line(error)
        return ""

    # --- samples ------------------------------------------------------------------------------------------------------

    def _samples(self, calls: Sequence[Call], rows: Mapping[int, int]) -> tuple[str, str]:
        """Return whether samples are independent, and the consequence; and the call in which they interact."""
        apart = "real, fake and penalised samples are processed one group after the other"
        if self.pooled:
            return f"a score belongs to several samples: {apart}", ""
        (place, _) = self.plan.outputs[0]
        why = keeps_apart(self.plan, place)
        if why is not None:
            meet = self.plan.meet
            if meet is None:
                return f"{why}: {apart}", ""
            call = calls[rows[meet]]
            where = f"{call.function} of {_layer(call.layer)}"
            if self.plan.calls[meet].rule is None:
                return (
                    f"{where} is left to autograd, which does not show whether samples interact in it: {apart}",
                    where,
                )
            return f"samples interact in {where}, or their independence cannot be proved: {apart}", where
        known = self._watched(place)
        if known:
            return f"samples are independent in autograd's graph, but {known}: {apart}", ""
        return "samples are independent: real, fake and penalised ones can be processed as one batch", ""

    def _watched(self, place: int) -> str:
        """Return a reason against one batch that is not visible in the graph, or ""."""
        watch = Watch()
        x = self.example.detach().requires_grad_()
        try:
            with self._restored():
                watch.follow(x)
                with uncompiled(), watch:
                    scores = scores_of(self.critic(x))
                graph = _graph_of(scores)
                known = settled(watch, _planned(graph, x), graph.nodes)
        except Exception as error:  # not the critic's, which has run without the watch
            return f"the critic cannot run under a function mode ({_first_line(error)})"
        if known is not None:
            return ""
        return watch.reason or "the axis of the samples could not be determined"

    # --- FLOPs --------------------------------------------------------------------------------------------------------

    def _eager_penalty(self) -> None:
        x, scores = self._scores()
        weights = [leaf for leaf in Graph([scores]).leaves if leaf is not None and leaf is not x]
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        penalty = grad.flatten(1).square().sum(1).mean() if grad.dim() > 1 else grad.square().mean()
        if weights and penalty.requires_grad:
            torch.autograd.grad(penalty, weights, allow_unused=True)

    def _penalty(self) -> None:
        task = Task(None, (("points", Norm(0.0)),), None, torch.is_grad_enabled(), 0 if self.pooled else 1)
        penalty_on_gradient(self.critic, self.example.detach(), task)

    def _counted(self, penalty: Callable[[], None]) -> tuple[int | None, str]:
        """Return the FLOPs of a penalty with its weight gradients, or None and the reason why it is not possible."""
        try:
            with self._restored():  # compiled parts included
                penalty()
            with self._restored(), uncompiled(), Flops() as flops:
                penalty()
        except RuntimeError as error:
            return None, _first_line(error)
        return flops.total, ""


def _way(calls: Sequence[Call]) -> str:
    generic = sum(call.method.startswith("generic") for call in calls)
    if generic:
        count = f"{generic} of {len(calls)} calls " + ("is" if generic == 1 else "are")
        return (
            f"{count} left to autograd; the others have rules" if generic < len(calls) else f"{count} left to autograd"
        )
    if any(call.method != "rule" for call in calls):
        return "every call has a rule; curved ones need one more pass over activations"
    return "every call has a rule"


def _layer(name: str) -> str:
    return f"layer {name}" if name else "the critic"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _short(name: str) -> str:
    """Strip the suffix of an autograd node's name."""
    return re.sub(r"Backward\d*$", "", name.rpartition("::")[2]) or name


def _graph_of(scores: Tensor) -> Graph:
    if not scores.requires_grad:
        raise constant_scores()
    return read_unfolded([scores])[0]


def _planned(graph: Graph, x: Tensor) -> Plan:
    at = next((i for i, leaf in enumerate(graph.leaves) if leaf is x), None)
    if at is None:
        raise constant_scores()
    return Plan(graph.key, {at: False}, len(x), 0)


def _alike(name: str) -> str:
    """Normalise a node's name: that of a reshape differs under a mode."""
    return "ViewBackward0" if name == "ReshapeAliasBackward0" else name
