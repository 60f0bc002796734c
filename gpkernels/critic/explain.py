"""Which way each call of a critic takes in a penalty, and why: `gpkernels explain`.

What is told is what the engine reads, autograd's graph of one call of the critic. That call is made once more with
hooks on the modules and a mode that sees each function, to learn which layer and function the graph's nodes came from.
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
from gpkernels.critic.plan import Plan
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Unfit
from gpkernels.critic.step import penalty_on_gradient
from gpkernels.critic.together import Watch, keeps_apart, settled
from gpkernels.ops.checks import check_batch
from gpkernels.private import TorchDispatchMode, tree_leaves, without_function_modes

_NO_INPUT = "critic: expected scores that depend on the input, got scores that do not"
_KINDS = {
    "CompiledFunctionBackward": "it is compiled",
    "DifferentiableGraphBackward": "it is scripted",
    "CopySlices": "it writes into a part of a tensor",
}
_FUSED_ATTENTION = "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) chooses attention that can"


@dataclass(frozen=True)
class Call:
    """One call of the critic that the input goes through.

    layer: the module that made it, by its name in the critic; "" for the critic itself. function: what was called, or
    autograd's name where no function of PyTorch was seen. way: "rule", "rule, curved" where activations have adjoints
    to be pulled down once more, or "generic: ..." with the reason why the call is left to autograd. flops: of the
    products and convolutions in it; None where they could not be told apart from other calls'.
    """

    layer: str
    function: str
    way: str
    flops: int | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` says; ``str`` of it is a table.

    calls: in order. way: of the whole critic. samples: whether these keep to themselves, and what follows for groups
    of them. forward_flops: of one call of the critic. eager_flops, flops: of a gradient penalty with its weight
    gradients in eager PyTorch and here; None where that is not possible, for the reason in eager_refusal or refusal.
    uncounted: an operation of which PyTorch counts no FLOPs though it has products; "" if there is none.
    """

    calls: list[Call]
    way: str
    samples: str
    forward_flops: int
    eager_flops: int | None
    flops: int | None
    eager_refusal: str = ""
    refusal: str = ""
    uncounted: str = ""

    def __str__(self) -> str:
        rows = [("layer", "call", "MFLOP", "way")]
        rows += [(c.layer or "(critic)", c.function, _mega(c.flops), c.way) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for layer, function, count, way in rows:
            lines.append(f"{layer:{widths[0]}}  {function:{widths[1]}}  {count:>{widths[2]}}  {way}")
        unit = self.forward_flops
        eager = self._passes(self.eager_flops, self.eager_refusal)
        ours = self._passes(self.flops, self.refusal)
        lines += ["", f"the critic: {self.way}", f"samples: {self.samples}", "penalty with weight gradients:"]
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
            and
        in eager PyTorch. ``print`` shows it as a table.

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
    """Calls the critic again and again, each time as it was before."""

    def __init__(self, critic: Callable[..., Any], example: Tensor) -> None:
        self.critic, self.example = critic, example
        self.modules = dict(_modules_of(critic))
        with self._as_it_was():
            self._scores()  # scripted parts have their final graph from the second call on
        with self._as_it_was():
            x, scores = self._scores()
            self.pooled = scores.numel() < len(x)
            graph = _graph_of(scores)
            self.names = [node.name() for node, _ in graph.nodes]
            self.plan = _planned(graph, x)
            # Asked while the buffers that nodes may have saved are as the call left them.
            generic = (i for i, c in enumerate(self.plan.calls) if c.moves and c.rule is None and not c.leaf)
            self.generic = {i: self._why_generic(i, graph.nodes) for i in generic}

    def explanation(self) -> Explanation:
        with self._as_it_was(), uncompiled(), _Flops() as forward:
            self._scores()
        calls, rows = self._calls()
        eager, eager_refusal = self._counted(self._eager_penalty)
        ours, refusal = self._counted(self._penalty)
        samples = self._samples(calls, rows)
        return Explanation(
            calls, _way(calls), samples, forward.total, eager, ours, eager_refusal, refusal, forward.uncounted
        )

    def _scores(self) -> tuple[Tensor, Tensor]:
        """A batch of its own and the critic's scores of it."""
        x = self.example.detach().requires_grad_()
        return x, scores_of(self.critic(x))

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Give back random numbers and buffers, such as running statistics, whatever happens."""
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
        """The calls, and in which of them each node of the graph is."""
        claims, told = self._claims()
        members: dict[Any, list[int]] = {}
        for i, call in enumerate(self.plan.calls):
            if call.moves and not call.leaf:
                claim = claims[i]
                # A node that no function claimed has a line of its own.
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
            calls.append(Call(layer, name, self._way_of(places), flops if told else None))
        return calls, rows

    def _claims(self) -> tuple[list[_Claim | None], bool]:
        """Where each node came from, and whether FLOPs were told apart.

        Compiled parts do not run as such while modes look on: then hooks alone tell the layers.
        """
        wanted = [_alike(name) for name in self.names]
        for functions, flops in ((True, True), (True, False), (False, False)):
            follow = _Follow(_names(self.modules))
            try:
                with self._as_it_was(), follow.modes(functions, flops), follow.hooks():
                    _, scores = self._scores()
                    follow.claim(scores)
                    nodes = [node for node, _ in _graph_of(scores).nodes]
            except Exception:  # the critic itself has run without being followed
                continue
            if [_alike(node.name()) for node in nodes] == wanted:
                return [follow.claims.get(node) for node in nodes], flops
        return [None] * len(wanted), False

    def _way_of(self, places: Sequence[int]) -> str:
        """The way of a call that has made some nodes."""
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
        """What PyTorch says where a node has no second derivative, otherwise nothing."""
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
        except Exception as error:  # whatever a function of the user's raises
            return _first_line(error)
        return ""

    # --- samples ------------------------------------------------------------------------------------------------------

    def _samples(self, calls: Sequence[Call], rows: Mapping[int, int]) -> str:
        """Whether samples keep to themselves, and what follows."""
        apart = "real, fake and penalised samples go through one after the other"
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
                return f"{where} is left to autograd, which does not tell whether samples meet in it: {apart}"
            return f"they meet in {where}, or it cannot be told that they do not: {apart}"
        known = self._watched(place)
        if known:
            return f"none reads another in autograd's graph, but {known}: {apart}"
        return "each keeps to itself: real, fake and penalised ones can go through as one batch"

    def _watched(self, place: int) -> str:
        """What speaks against one batch that a graph does not show."""
        watch = Watch()
        x = self.example.detach().requires_grad_()
        try:
            with self._as_it_was():
                watch.follow(x)
                with uncompiled(), watch:
                    scores = scores_of(self.critic(x))
                graph = _graph_of(scores)
                known = settled(watch, _planned(graph, x), graph.nodes)
        except Exception as error:  # the critic itself has run without being watched
            return f"the critic cannot be watched ({_first_line(error)})"
        if known is not None:
            return ""
        return watch.reason or "where their values lie could not be told"

    # --- FLOPs --------------------------------------------------------------------------------------------------------

    def _eager_penalty(self) -> None:
        x, scores = self._scores()
        weights = [leaf for leaf in _graph_of(scores).leaves if leaf is not None and leaf is not x]
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        penalty = grad.flatten(1).square().sum(1).mean() if grad.dim() > 1 else grad.square().mean()
        if weights and penalty.requires_grad:
            torch.autograd.grad(penalty, weights, allow_unused=True)

    def _penalty(self) -> None:
        penalty_on_gradient(self.critic, self.example.detach(), 0.0, False, by_point=self.pooled)

    def _counted(self, penalty: Callable[[], None]) -> tuple[int | None, str]:
        """FLOPs of a penalty with its weight gradients, or why it is not possible."""
        try:
            with self._as_it_was():  # with what is compiled
                penalty()
            with self._as_it_was(), uncompiled(), _Flops() as flops:
                penalty()
        except RuntimeError as error:
            return None, _first_line(error)
        return flops.total, ""


def _way(calls: Sequence[Call]) -> str:
    generic = sum(call.way.startswith("generic") for call in calls)
    if generic:
        count = f"{generic} of {len(calls)} calls " + ("is" if generic == 1 else "are")
        return (
            f"{count} left to autograd; the others have rules" if generic < len(calls) else f"{count} left to autograd"
        )
    if any(call.way != "rule" for call in calls):
        return "every call has a rule; curved ones take one more pass over activations"
    return "every call has a rule"


def _layer(name: str) -> str:
    return f"layer {name}" if name else "the critic"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _short(name: str) -> str:
    """Autograd's name of a node without its ending."""
    return re.sub(r"Backward\d*$", "", name.rpartition("::")[2]) or name


def _graph_of(scores: Tensor) -> Graph:
    if not scores.requires_grad:
        raise ValueError(_NO_INPUT)
    return Graph([scores])


def _planned(graph: Graph, x: Tensor) -> Plan:
    at = next((i for i, leaf in enumerate(graph.leaves) if leaf is x), None)
    if at is None:
        raise ValueError(_NO_INPUT)
    return Plan(graph.key, at, False, len(x), 0)


def _alike(name: str) -> str:
    """A node's name; a reshape's, too, which is another one's while a mode looks on."""
    return "ViewBackward0" if name == "ReshapeAliasBackward0" else name


# --- where nodes come from --------------------------------------------------------------------------------------------


def _modules_of(critic: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a critic consists of or holds, by name; that of the critic itself is ""."""
    if isinstance(critic, nn.Module):
        yield "", critic
        return
    owner = getattr(critic, "__self__", None)
    if isinstance(owner, nn.Module):  # a method
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
    """The name of each module and of those in it, but for what is compiled: hooks there would be, too."""
    found: dict[nn.Module, str] = {}
    for prefix, module in modules.items():
        for name, inner in module.named_modules(prefix=prefix):
            if "_orig_mod" not in name.split("."):
                found.setdefault(inner, name)
    return found


class _Flops(TorchDispatchMode):
    """FLOPs of products and convolutions, by PyTorch's own registry."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # it imports Triton, which importing this must not

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
    """Nodes that one function made in one layer; function: "" where none was seen."""

    def __init__(self, number: int, layer: str, function: str, flops: int) -> None:
        self.number, self.layer, self.function, self.flops = number, layer, function, flops


class _Follow(TorchFunctionMode):
    """Ties nodes of autograd's graph to the layer at work and the function that was called when they first appeared."""

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
        """Hooks that keep the name of the module at work on top of the stack."""

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
            if scripted:  # they take no hooks of their own
                hooks.callback(register_module_forward_pre_hook(partial(if_scripted, enter)).remove)
                hooks.callback(register_module_forward_hook(partial(if_scripted, leave), always_call=True).remove)
            for module in self.names:
                if module not in scripted:
                    hooks.callback(module.register_forward_pre_hook(enter).remove)
                    hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.claim((args, kwargs))  # what custom functions made, which no mode sees
        out = func(*args, **kwargs)
        self.claim((args, kwargs, out), _name_of(func))  # a call in place, or into a part, gives an argument a new node
        return out

    def claim(self, values: Any, function: str = "") -> None:
        """Give the nodes that lead to some tensors, and that nobody has, to the layer at work."""
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
    """A function's name as users write it."""
    name: str = resolve_name(func) or getattr(func, "__name__", type(func).__name__)
    name = name.removesuffix(".__get__").rpartition(".")[2]
    return name.strip("_") or name
