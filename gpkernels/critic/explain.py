"""Report of how each call of a critic is differentiated in a penalty: `gpkernels explain`.

The report is read from autograd's graph of one call of the critic, as the passes read it. The critic is called once
more with module hooks and a function mode, to attribute the graph's nodes to layers and functions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, resolve_name

from gpkernels.critic.call import scores_of, uncompiled
from gpkernels.critic.generic import Edge, Outsider
from gpkernels.critic.graph import LEAF, Graph
from gpkernels.critic.parts import Norm, Task, constant_scores
from gpkernels.critic.plan import Plan
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Unfit
from gpkernels.critic.step import penalty_on_gradient
from gpkernels.critic.together import Watch, keeps_apart, settled
from gpkernels.ops.checks import check_batch
from gpkernels.private import TorchDispatchMode, tree_leaves, without_function_modes

_KINDS = {
    "CompiledFunctionBackward": "it is compiled",
    "DifferentiableGraphBackward": "it is scripted",
    "CopySlices": "it writes into a slice of a tensor",
}
_FUSED_ATTENTION = "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) chooses attention that can"


@dataclass(frozen=True)
class Call:
    """One call of the critic that depends on the input.

    layer: name of the module that made it; "" for the critic itself. function: the function called, or autograd's name
    where no PyTorch function was seen. method: "rule", "rule, curved" for a call with second-order terms, or "generic:
    ..." with the reason why the call is left to autograd. flops: of its products and convolutions; None where they
    could not be attributed.
    """

    layer: str
    function: str
    method: str
    flops: int | None


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`; ``str`` formats it as a table.

    calls: in order. method: summary for the whole critic. samples: whether they are independent, and the consequence
    for groups of them. forward_flops: of one call of the critic. eager_flops, flops: of a gradient penalty with its
    weight gradients in eager PyTorch and here; None where that is not possible, for the reason in eager_refusal or
    refusal. uncounted: an operation with products of which PyTorch counts no FLOPs; "" if there is none.
    """

    calls: list[Call]
    method: str
    samples: str
    forward_flops: int
    eager_flops: int | None
    flops: int | None
    eager_refusal: str = ""
    refusal: str = ""
    uncounted: str = ""

    def __str__(self) -> str:
        rows = [("layer", "call", "MFLOP", "method")]
        rows += [(c.layer or "(critic)", c.function, _mega(c.flops), c.method) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for layer, function, count, method in rows:
            lines.append(f"{layer:{widths[0]}}  {function:{widths[1]}}  {count:>{widths[2]}}  {method}")
        unit = self.forward_flops
        eager = self._passes(self.eager_flops, self.eager_refusal)
        ours = self._passes(self.flops, self.refusal)
        lines += ["", f"the critic: {self.method}", f"samples: {self.samples}", "penalty with weight gradients:"]
        lines += [f"  in eager PyTorch: {eager}", f"  here: {ours}"]
        if self.uncounted:
            lines.append(f"  without the products of {self.uncounted}, of which PyTorch counts no FLOPs")
        elif unit:
            lines.append(f"  L, the FLOPs of products in one call of the critic: {_mega(unit)} MFLOP")
        return "\n".join(lines)

    def _passes(self, count: int | None, refusal: str) -> str:
        if count is None:
            return f"not possible: {refusal}"
        if self.uncounted or not self.forward_flops:
            return f"{_mega(count)} MFLOP"
        return f"{count / self.forward_flops:.2f} L"


def _mega(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.3f}"


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
    if not callable(critic):
        raise TypeError(f"critic: expected a module or a callable, got {type(critic).__name__}")
    with torch.enable_grad():
        return _Explainer(critic, example).explanation()


class _Explainer:
    """Calls the critic repeatedly, restoring its buffers and the random number generators each time."""

    def __init__(self, critic: Callable[..., Any], example: Tensor) -> None:
        self.critic, self.example = critic, example
        self.modules = dict(_modules_of(critic))
        with self._restored():
            self._scores()  # scripted parts are optimised after their first call
        with self._restored():
            x, scores = self._scores()
            self.pooled = scores.numel() < len(x)
            graph = _graph_of(scores)
            self.names = [node.name() for node, _ in graph.nodes]
            self.plan = _planned(graph, x)
            # Done before buffers that nodes may have saved are restored.
            generic = (i for i, c in enumerate(self.plan.calls) if c.moves and c.rule is None and not c.leaf)
            self.generic = {i: self._why_generic(i, graph.nodes) for i in generic}

    def explanation(self) -> Explanation:
        with self._restored(), uncompiled(), _Flops() as forward:
            self._scores()
        calls, rows = self._calls()
        eager, eager_refusal = self._counted(self._eager_penalty)
        ours, refusal = self._counted(self._penalty)
        samples = self._samples(calls, rows)
        return Explanation(
            calls, _summary(calls), samples, forward.total, eager, ours, eager_refusal, refusal, forward.uncounted
        )

    def _scores(self) -> tuple[Tensor, Tensor]:
        """Call the critic on a fresh copy of the example; return the copy and the scores."""
        x = self.example.detach().requires_grad_()
        return x, scores_of(self.critic(x))

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Context manager that restores random number generators and buffers, such as running statistics."""
        found = {id(m): m for module in self.modules.values() for m in module.modules()}
        kept = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in found.values()
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        device = self.example.device
        devices = [device] if device.type not in ("cpu", "meta") else []
        kind = device.type if devices else "cuda"
        try:
            with torch.random.fork_rng(devices, device_type=kind):
                yield
        finally:
            with torch.no_grad():
                for buffers, name, buffer, value in kept:
                    buffer.copy_(value)
                    buffers[name] = buffer

    # --- calls --------------------------------------------------------------------------------------------------------

    def _calls(self) -> tuple[list[Call], dict[int, int]]:
        """Return the calls, and the call of each node of the graph."""
        claims, attributed = self._claims()
        members: dict[Any, list[int]] = {}
        for i, call in enumerate(self.plan.calls):
            if call.moves and not call.leaf:
                claim = claims[i]
                # A node without a function has a line of its own.
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
            calls.append(Call(layer, name, self._method_of(places), flops if attributed else None))
        return calls, rows

    def _claims(self) -> tuple[list[_Claim | None], bool]:
        """Return the origin of each node, and whether FLOPs were attributed.

        Compiled parts do not run compiled under a mode; hooks alone then identify the layers.
        """
        wanted = [_alike(name) for name in self.names]
        for functions, flops in ((True, True), (True, False), (False, False)):
            follow = _Follow(_names(self.modules))
            try:
                with self._restored(), follow.modes(functions, flops), follow.hooks():
                    _, scores = self._scores()
                    follow.claim(scores)
                    nodes = [node for node, _ in _graph_of(scores).nodes]
            except Exception:  # the mode's fault: the critic has run without it
                continue
            if [_alike(node.name()) for node in nodes] == wanted:
                return [follow.claims.get(node) for node in nodes], flops
        return [None] * len(wanted), False

    def _method_of(self, places: Sequence[int]) -> str:
        """Describe how a call that made some nodes is differentiated."""
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
        """Return PyTorch's error for a node without a second derivative, otherwise an empty string."""
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
        except Exception as error:  # whatever a custom function raises
            return _first_line(error)
        return ""

    # --- samples ------------------------------------------------------------------------------------------------------

    def _samples(self, calls: Sequence[Call], rows: Mapping[int, int]) -> str:
        """Describe whether samples are independent, and the consequence."""
        apart = "real, fake and penalised samples are processed one group after the other"
        if self.pooled:
            return f"a score belongs to several samples: {apart}"
        (place, _) = self.plan.outputs[0]
        why = keeps_apart(self.plan, place)
        if why is not None:
            meet = self.plan.meet
            if meet is None:
                return f"{why}: {apart}"
            call = calls[rows[meet]]
            where = f"{call.function} of {_layer(call.layer)}"
            if self.plan.calls[meet].rule is None:
                return f"{where} is left to autograd, which does not show whether samples interact in it: {apart}"
            return f"samples interact in {where}, or their independence cannot be proved: {apart}"
        known = self._watched(place)
        if known:
            return f"samples are independent in autograd's graph, but {known}: {apart}"
        return "samples are independent: real, fake and penalised ones can be processed as one batch"

    def _watched(self, place: int) -> str:
        """Return a reason against one batch that the graph does not show."""
        watch = Watch()
        x = self.example.detach().requires_grad_()
        try:
            with self._restored():
                watch.follow(x)
                with uncompiled(), watch:
                    scores = scores_of(self.critic(x))
                graph = _graph_of(scores)
                known = settled(watch, _planned(graph, x), graph.nodes)
        except Exception as error:  # the mode's fault: the critic has run without it
            return f"the critic cannot run under a function mode ({_first_line(error)})"
        if known is not None:
            return ""
        return watch.reason or "the axis of the samples could not be determined"

    # --- FLOPs --------------------------------------------------------------------------------------------------------

    def _eager_penalty(self) -> None:
        x, scores = self._scores()
        weights = [leaf for leaf in _graph_of(scores).leaves if leaf is not None and leaf is not x]
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        penalty = grad.flatten(1).square().sum(1).mean() if grad.dim() > 1 else grad.square().mean()
        if weights and penalty.requires_grad:
            torch.autograd.grad(penalty, weights, allow_unused=True)

    def _penalty(self) -> None:
        task = Task(None, (("points", Norm(0.0)),), None, torch.is_grad_enabled(), 0 if self.pooled else 1)
        penalty_on_gradient(self.critic, self.example.detach(), task)

    def _counted(self, penalty: Callable[[], None]) -> tuple[int | None, str]:
        """Count the FLOPs of a penalty with its weight gradients; return the error where it is not possible."""
        try:
            with self._restored():  # compiled parts included
                penalty()
            with self._restored(), uncompiled(), _Flops() as flops:
                penalty()
        except RuntimeError as error:
            return None, _first_line(error)
        return flops.total, ""


def _summary(calls: Sequence[Call]) -> str:
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
    """Strip the suffix of autograd's name of a node."""
    return re.sub(r"Backward\d*$", "", name.rpartition("::")[2]) or name


def _graph_of(scores: Tensor) -> Graph:
    if not scores.requires_grad:
        raise constant_scores()
    return Graph([scores])


def _planned(graph: Graph, x: Tensor) -> Plan:
    at = next((i for i, leaf in enumerate(graph.leaves) if leaf is x), None)
    if at is None:
        raise constant_scores()
    return Plan(graph.key, {at: False}, len(x), 0)


def _alike(name: str) -> str:
    """Normalise a node's name: a reshape's differs under a mode."""
    return "ViewBackward0" if name == "ReshapeAliasBackward0" else name


# --- where nodes come from --------------------------------------------------------------------------------------------


def _modules_of(critic: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a critic consists of or refers to, with names; that of the critic itself is ""."""
    if isinstance(critic, nn.Module):
        yield "", critic
        return
    owner = getattr(critic, "__self__", None)
    if isinstance(owner, nn.Module):  # a bound method
        yield "", owner
        return
    held: dict[str, Any] = {}
    if isinstance(critic, partial):
        yield from _modules_of(critic.func)
        held = {**{str(i): x for i, x in enumerate(critic.args)}, **critic.keywords}
    elif inspect.isfunction(critic):
        seen = inspect.getclosurevars(critic)
        held = {**seen.globals, **seen.nonlocals}
    else:
        held = getattr(critic, "__dict__", {})
    yield from ((name, x) for name, x in held.items() if isinstance(x, nn.Module))


def _names(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Map each module and submodule to its name, except compiled ones: hooks there would be compiled too."""
    found: dict[nn.Module, str] = {}
    for prefix, module in modules.items():
        for name, inner in module.named_modules(prefix=prefix):
            if "_orig_mod" not in name.split("."):
                found.setdefault(inner, name)
    return found


class _Flops(TorchDispatchMode):
    """Counter of the FLOPs of products and convolutions, by PyTorch's registry."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton, so not at import time

        super().__init__()
        self.total, self.uncounted, self.registry = 0, "", flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self.registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        elif "rnn_layer" in func.__name__ or "cudnn_rnn" in func.__name__:
            self.uncounted = str(func._overloadpacket).removeprefix("aten.")
        return out


class _Claim:
    """Nodes that one function created in one layer; function: "" where none was seen."""

    def __init__(self, number: int, layer: str, function: str, flops: int) -> None:
        self.number, self.layer, self.function, self.flops = number, layer, function, flops


class _Follow(TorchFunctionMode):
    """Attributes autograd's nodes to the layer and function during which they first appeared."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.claims: dict[Any, _Claim] = {}
        self._stack, self._count, self._told = [""], 0, 0
        self._flops = _Flops()

    @contextmanager
    def modes(self, functions: bool, flops: bool) -> Iterator[None]:
        with ExitStack() as modes:
            if functions or flops:
                modes.enter_context(uncompiled())
            for mode in [self._flops] * flops + [self] * functions:
                modes.enter_context(mode)
            yield

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Context manager whose hooks keep the current module's name on top of the stack."""

        def enter(module: nn.Module, args: Any) -> None:
            self.claim(args)
            self._stack.append(self.names[module])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.claim(output)
            self._stack.pop()

        thread, scripted = get_ident(), {m for m in self.names if isinstance(m, torch.jit.ScriptModule)}

        def if_scripted(hook: Callable[..., None], module: nn.Module, *args: Any) -> None:
            if module in scripted and get_ident() == thread:
                hook(module, *args)

        with ExitStack() as hooks:
            if scripted:  # these accept no hooks
                hooks.callback(register_module_forward_pre_hook(partial(if_scripted, enter)).remove)
                hooks.callback(register_module_forward_hook(partial(if_scripted, leave), always_call=True).remove)
            for module in self.names:
                if module not in scripted:
                    hooks.callback(module.register_forward_pre_hook(enter).remove)
                    hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.claim((args, kwargs))  # nodes of custom functions, which no mode sees
        out = func(*args, **kwargs)
        self.claim((args, kwargs, out), _name_of(func))  # an in-place call gives an argument a new node
        return out

    def claim(self, values: Any, function: str = "") -> None:
        """Attribute the new nodes that lead to some tensors to the current layer."""
        fresh: list[Any] = []
        with without_function_modes():
            for x in tree_leaves(values):
                if isinstance(x, Tensor):
                    self._walk([y.grad_fn for y in (x, x._base) if y is not None], fresh)
        if fresh:
            claim = _Claim(self._count, self._stack[-1], function, self._flops.total - self._told)
            self._count, self._told = self._count + 1, self._flops.total
            self.claims.update(dict.fromkeys(fresh, claim))

    def _walk(self, roots: Iterable[Any], fresh: list[Any]) -> None:
        stack = list(roots)
        seen = set(fresh)
        while stack:
            node = stack.pop()
            if node is None or node in self.claims or node in seen or node.name() == LEAF:
                continue
            seen.add(node)
            fresh.append(node)
            stack += [parent for parent, _ in node.next_functions]


def _name_of(func: Any) -> str:
    """Return a function's name as users write it."""
    name: str = resolve_name(func) or getattr(func, "__name__", type(func).__name__)
    name = name.removesuffix(".__get__").rpartition(".")[2]
    return name.strip("_") or name
