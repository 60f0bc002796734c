"""Recording of a graph: one run, and the backward passes of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.random import fork_rng

from gpkernels.compiler.connect import connected
from gpkernels.compiler.replay import Backward, Lists
from gpkernels.critic.program import Program, Recorder, Untraceable
from gpkernels.critic.slots import Slot, flat, homes_of, slots_made, slots_read
from gpkernels.critic.traced import delivered_by
from gpkernels.private import HigherOrderOperator, OpOverload

_IN_PLACE = {
    "setitem",
    *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or")),
}
_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
_OF_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEX = ("index", "_unsafe_index")  # whose results' sizes depend on data only where an index is a mask
_LONGER = ("cumprod", "prod")  # decomposed into many more calls under a dispatch mode


def graphs_of(graph: Any) -> list[torch.fx.GraphModule]:
    """Return a graph and those that its calls are given, such as checkpointed regions."""
    return [g for g in graph.modules() if isinstance(g, torch.fx.GraphModule)] if hasattr(graph, "modules") else []


class _Writer(Recorder):
    """A recorder that stops at the first call that cannot be replayed. reason: why it stopped."""

    supports_higher_order_operators = True

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self.reason: str | None = None
        self.stored = {x.untyped_storage()._cdata for x in inputs}
        self.written: set[int] = set()  # storages of mutated inputs
        self.reads: set[int] = set()  # inputs that are Python numbers, which Dynamo passes as tensors

    def slot(self, x: Any) -> Any:
        try:
            return super().slot(x)
        except Untraceable as error:
            self.reason = self.reason or str(error)
            return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):  # which calls one of its graphs, or several, by values
            self.reason = self.reason or f"{func} calls graphs"
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense" and self._is_number(args[0]):
            self.reads.add(self.inputs.index(self.known[id(args[0])]))
            return func(*args)
        if any(name.startswith(word) for word in _READS) or self._is_of_data(func, name, args):
            self.reason = self.reason or f"{name} reads values back"
        if name == "as_strided" and args[0].untyped_storage()._cdata in self.stored:
            self.reason = self.reason or "as_strided has a place in an input's storage, where inputs may be anywhere"
        if name in _LONGER:
            self.reason = self.reason or f"{name} is differentiated in another way"
        if torch.Tag.inplace_view in func.tags:
            self.reason = self.reason or f"{name} changes the geometry of a tensor, which views are told apart by"
        if func._schema.is_mutable:
            for given in _targets(func, args):
                several = given if isinstance(given, (list, tuple)) else [given]
                self.written |= {x.untyped_storage()._cdata for x in several if isinstance(x, Tensor)} & self.stored
        if self.reason is not None:
            return func(*args, **(kwargs or {}))
        found = super().__torch_dispatch__(func, types, args, kwargs)
        for x in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(x, Tensor) and x.is_complex():  # conjugates, and real gradients of these, are not replayed
                self.reason = f"{name} returns complex numbers"
        return found

    @staticmethod
    def _is_of_data(func: Any, name: str, args: Sequence[Any]) -> bool:
        """Whether the sizes of results depend on data."""
        if name in _INDEX:
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return not _OF_DATA.isdisjoint(func.tags)

    def _is_number(self, x: Tensor) -> bool:
        slot = self.known.get(id(x))
        plain = x.dim() == 0 and x.device.type == "cpu" and not x.requires_grad
        return plain and slot in self.inputs and x.untyped_storage()._cdata not in self.written


def recorded(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[Lists | None, Any, set[int]]:
    """Run a graph and record it: the lists, None if that fails, its outputs, and the inputs whose values it reads."""
    places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    tensors = [inputs[i] for i in places]
    wanted = [x.requires_grad and torch.is_grad_enabled() for x in tensors]
    moving = any(w and not x.is_leaf for w, x in zip(wanted, tensors, strict=True))
    if not all(map(_is_plain, tensors)) or (moving and _may_write(graph)):
        return None, graph(*inputs), set()
    aliases = [x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
    own = list(inputs)
    for i, x in zip(places, aliases, strict=True):
        own[i] = x
    writer = _Writer(aliases)
    with writer:
        outputs = graph(*own)
    found = list(outputs)
    leaves = [i for i, w in enumerate(wanted) if w]
    given = {i: k for i, y in enumerate(found) for k, x in enumerate(aliases) if y is x}
    adopted = [k for k, x in enumerate(aliases) if x.requires_grad and not wanted[k]]
    lists = None
    others = [x for i, x in enumerate(found) if i not in given]
    if writer.reason is None and not adopted and _apart(others, aliases):
        written = [places[i] for i, x in enumerate(aliases) if x.untyped_storage()._cdata in writer.written]
        differentiable = [i for i, x in enumerate(found) if x.requires_grad and i not in given]
        lists = _lists(writer, places, aliases, found, differentiable, leaves, written, isinstance(outputs, list))
        if lists is not None:
            lists.given = {i: places[k] for i, k in given.items()}
    found = connected(found, aliases, tensors, leaves, adopted)
    reads = {places[i] for i in writer.reads}
    return lists, found if isinstance(outputs, list) else tuple(found), reads


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor has no more to it than a layout and numbers; conjugates are not seen by modes."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_complex()


def _may_write(graph: Any) -> bool:
    """Whether a graph may write to an input that is an activation, whose own autograd graph would be bypassed."""
    for node in [node for one in graphs_of(graph) for node in one.graph.nodes]:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        flagged = any(x is True for x in (*node.args, node.kwargs.get("inplace"))) or "out" in node.kwargs
        if node.op.startswith("call") and (in_place or flagged or name.strip("_") in _IN_PLACE):
            return True
    return False


def _apart(outputs: list[Any], inputs: list[Tensor]) -> bool:
    """Whether outputs are plain results that share no memory with each other or an input."""
    if not all(
        type(x) is Tensor and x.layout == torch.strided and not (x.is_leaf and x.requires_grad) for x in outputs
    ):
        return False
    storages = [x.untyped_storage()._cdata for x in outputs]
    return len(set(storages)) == len(storages) and not {x.untyped_storage()._cdata for x in inputs} & set(storages)


def _lists(
    writer: _Writer,
    places: list[int],
    aliases: list[Tensor],
    outputs: list[Tensor],
    differentiable: list[int],
    leaves: list[int],
    written: list[int],
    is_list: bool,
) -> Lists | None:
    detached = [x.detach() for x in outputs]
    for x, d in zip(outputs, detached, strict=True):
        writer.known[id(d)] = writer.slot(x)
        writer.alive.append(d)
    at = [places[i] for i in leaves]

    def made(program: Program) -> Lists:
        return Lists(places, program, len(outputs), at, written, is_list)

    if not differentiable:
        return None if writer.reason else made(Program.of(writer, detached))
    known = delivered_by(outputs[differentiable[0]]) if len(differentiable) == 1 else None
    if known is not None:
        numbers = {id(x): i for i, x in enumerate(aliases)}
        if all(id(x) in numbers for x, _ in known):
            lists = made(Program.of(writer, [*detached, *[g for _, g in known]]))
            lists.known = differentiable[0], [places[numbers[id(x)]] for x, _ in known]
            return lists if writer.reason is None else None
    return _with_backward(writer, aliases, outputs, detached, differentiable, leaves, made)


def _with_backward(
    writer: _Writer,
    aliases: list[Tensor],
    outputs: list[Tensor],
    detached: list[Tensor],
    differentiable: list[int],
    leaves: list[int],
    made: Callable[[Program], Lists],
) -> Lists | None:
    forward_calls, inputs, before = list(writer.calls), list(writer.inputs), writer.count
    end = [aliases[i] for i in leaves]
    groups: list[tuple[list[int], list[_Pass]]] = []
    for places in _groups(outputs, differentiable):
        own: list[_Pass] = []
        for some in [places] if len(places) == 1 else [places, *([i] for i in places)]:
            found = _pass_of(writer, [outputs[i] for i in some], end, before)
            if found is None:
                return None
            own.append(found)
        groups.append((places, own))
    homes, needed = homes_of(forward_calls), list[list[Slot]]()
    for _, own in groups:
        read = {s for one in own for s in one.read() if s < before}
        needed.append(sorted(read | {homes.get(s, s) for s in read}))  # a view's base, whose version is compared
    outs = [writer.slot(x) for x in detached]
    saved = sorted({s for slots in needed for s in slots})
    lists = made(Program(forward_calls, inputs, [*outs, *saved], writer.facts))
    for (places, own), slots in zip(groups, needed, strict=True):
        whole, *alone = [Program(one.calls, [*slots, *one.given], one.gradients, writer.facts) for one in own]
        at = [len(outs) + saved.index(s) for s in slots]
        lists.backward.append(Backward(places, at, own[0].strides, whole, alone))
    return lists


def _groups(outputs: Sequence[Tensor], differentiable: Sequence[int]) -> list[list[int]]:
    """Part outputs into groups whose graphs have only leaves in common."""
    groups: list[tuple[list[int], set[Any]]] = []
    for i in differentiable:
        nodes, waiting = set[Any](), [outputs[i].grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in nodes and not hasattr(node, "variable"):
                nodes.add(node)
                waiting += [following for following, _ in node.next_functions]
        met = [group for group in groups if not nodes.isdisjoint(group[1])]
        groups = [group for group in groups if group not in met]
        groups.append((sorted([i, *(k for places, _ in met for k in places)]), nodes.union(*(own for _, own in met))))
    return [places for places, _ in groups]


class _Pass(NamedTuple):
    """A recorded backward pass: its calls, the slots of cotangents and gradients, and the former's strides."""

    calls: list[Any]
    given: list[Slot]
    gradients: list[Slot | None]
    strides: list[tuple[int, ...]]

    def read(self) -> set[Slot]:
        return {s for call in self.calls for s in slots_read(call)} | {s for s in self.gradients if s is not None}


def _pass_of(writer: _Writer, ends: Sequence[Tensor], leaves: Sequence[Tensor], before: int) -> _Pass | None:
    """Record the backward pass of some outputs; None if it cannot be replayed. before: slots of the forward pass."""
    cotangents = [torch.ones_like(x) for x in ends]
    views, writes = dict(writer.views), set(writer.written)
    given = [writer._new(x) for x in cotangents]
    writer.calls = []
    try:
        with fork_rng({x.get_device() for x in leaves if x.is_cuda}), writer, torch.no_grad():
            found = torch.autograd.grad(ends, leaves, cotangents, retain_graph=True, allow_unused=True)
    except Exception:  # it is raised where the author asks for this pass, which may be never
        return None
    gradients = [None if g is None else writer.slot(g) for g in found]
    if writer.reason is not None or writer.written != writes:
        return None
    writer.views = views  # this pass's own are not there in another
    one = _Pass(writer.calls, given, gradients, [c.stride() for c in cotangents])
    own = {*given, *(s for call in one.calls for s in slots_made(call))}
    whole = all(s < before or s in own for s in one.read())
    return one if whole and not any(_differs_later(call, before) for call in one.calls) else None


def _differs_later(call: Any, before: int) -> bool:
    """Whether a call of a backward pass draws random numbers, or mutates a forward result, which a replay may need."""
    func, args, _, _ = call
    mutates = any(s < before for s in flat(_targets(func, args)) if isinstance(s, Slot))
    return mutates or torch.Tag.nondeterministic_seeded in func.tags


def _targets(func: Any, args: Sequence[Any]) -> list[Any]:
    """Return the arguments that a call mutates."""
    return [
        given
        for argument, given in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
