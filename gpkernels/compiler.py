"""``torch.compile(step, backend="gpkernels")``: replay of a step's ATen calls, without code generation.

Dynamo traces and guards the step. The first run of its graph for given sizes records the ATen calls of forward and
backward; later runs replay the list in the native loop that also runs critics' passes, with neither Python nor autograd
between two calls. No code is generated, so compilation takes about a second.

A graph that cannot be recorded (it reads values back, returns views of its inputs, has complex numbers, changes shapes
in place, or takes tensor subclasses) runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from gpkernels import backends
from gpkernels.critic.deliver import deliver
from gpkernels.critic.program import Program, Recorder, Untraceable, watched
from gpkernels.critic.slots import Slot, flat, slots_read
from gpkernels.critic.traced import delivered_by
from gpkernels.private import dual_level

CAPACITY = 64  # input sizes per graph for which lists are kept
_IN_PLACE = {
    "setitem",
    *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or")),
}
_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
_LONGER = ("cumprod", "prod")  # decomposed into many more calls under a dispatch mode


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
    return _Graph(graph, any(not isinstance(x, Tensor) for x in example_inputs)).run


class _Graph:
    """A graph and its recorded lists, by the sizes of its inputs and the numbers that it reads from them."""

    def __init__(self, graph: torch.fx.GraphModule, dynamic: bool) -> None:
        self.graph, self.dynamic = graph, dynamic
        self._lists: dict[Any, _Lists | None] = {}
        self._reads: list[int] = []

    def run(self, *inputs: Any) -> Any:
        if backends.forced() is not None or watched() or dual_level() >= 0:
            return self.graph(*inputs)
        key = self._key(inputs)
        if key not in self._lists:
            if len(self._lists) >= CAPACITY:
                self._lists.clear()
            lists, outputs, reads = _written_down(self.graph, inputs)
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


def _sizes(x: Any) -> Any:
    return (x.shape, x.stride()) if isinstance(x, Tensor) else x


class _Lists:
    """Recorded calls of a graph. forward returns outputs, then gradients of a loss or tensors for backward."""

    def __init__(
        self, places: list[int], forward: Program, count: int, leaves: list[int], written: list[int], is_list: bool
    ) -> None:
        self.places, self.forward, self.count, self.leaves, self.written = places, forward, count, leaves, written
        self.is_list = is_list
        self.given: dict[int, int] = {}  # outputs that are inputs, by place
        self.known: tuple[int, list[int]] | None = None  # an output with precomputed gradients, and their inputs
        self.backward: Program | None = None
        self.differentiable: list[int] = []  # places among the outputs
        self.strides: list[tuple[int, ...]] = []  # of their cotangents, for which calls were recorded

    def run(self, inputs: Sequence[Any]) -> Any:
        results: list[Any] = self.forward.run([inputs[i] for i in self.places], _nobody)
        outputs = results[: self.count]
        if self.written:
            increment_version([inputs[i] for i in self.written])
        if self.known is not None:
            place, leaves = self.known
            pairs = list(zip([inputs[i] for i in leaves], results[self.count :], strict=True))
            outputs[place] = deliver(outputs[place], pairs)
        elif self.backward is not None:
            leaves_ = [inputs[i] for i in self.leaves]
            made = _Replayed.apply(self, results, *leaves_)
            for place, out in zip(self.differentiable, made, strict=True):
                outputs[place] = out
        for place, i in self.given.items():
            outputs[place] = inputs[i]
        return outputs if self.is_list else tuple(outputs)


def _nobody(name: Any, given: Any) -> Any:
    raise AssertionError("a list of a compiled graph has no untraced calls")


class _Replayed(Function):
    """Outputs whose backward pass replays a list."""

    @staticmethod
    def forward(ctx: Any, lists: _Lists, results: list[Tensor], *leaves: Tensor) -> Any:
        ctx.lists = lists
        ctx.save_for_backward(*results[lists.count :])
        return tuple([results[i] for i in lists.differentiable])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        _refuse_create_graph()
        lists: _Lists = ctx.lists
        assert lists.backward is not None
        given = [_laid_out(c, strides) for c, strides in zip(cotangents, lists.strides, strict=True)]
        return None, None, *lists.backward.run([*ctx.saved_tensors, *given], _nobody)


def _refuse_create_graph() -> None:
    """Raise where gradients are to have a graph, which these have not: a loss of them would lack its gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'torch.compile with backend="gpkernels" does not support double backward (create_graph=True) through what '
            "it compiled; compute the gradient inside the compiled function, such as by gpkernels.input_gradient, or "
            "compile no part of it"
        )


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


class _Bridged(Function):
    """Outputs of a graph that ran on aliases of its inputs, connected to the inputs' autograd graph."""

    @staticmethod
    def forward(ctx: Any, outputs: list[Tensor], aliases: list[Tensor], *leaves: Tensor) -> Any:
        ctx.outputs, ctx.aliases = outputs, aliases
        return tuple([x.detach() for x in outputs])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        _refuse_create_graph()
        found = torch.autograd.grad(ctx.outputs, ctx.aliases, cotangents, retain_graph=True, allow_unused=True)
        return None, None, *found


class _Writer(Recorder):
    """A recorder that stops at the first call that cannot be replayed. reason: why it stopped."""

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
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense" and self._is_number(args[0]):
            self.reads.add(self.inputs.index(self.known[id(args[0])]))
            return func(*args)
        if any(name.startswith(word) for word in _READS):
            self.reason = self.reason or f"{name} reads values back"
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

    def _is_number(self, x: Tensor) -> bool:
        slot = self.known.get(id(x))
        plain = x.dim() == 0 and x.device.type == "cpu" and not x.requires_grad
        return plain and slot in self.inputs and x.untyped_storage()._cdata not in self.written


def _written_down(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[_Lists | None, Any, set[int]]:
    """Run a graph and record it: the lists, None if that fails, its outputs, and the inputs whose values it reads."""
    places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    tensors = [inputs[i] for i in places]
    wanted = [x.requires_grad and torch.is_grad_enabled() for x in tensors]
    moving = any(w and not x.is_leaf for w, x in zip(wanted, tensors, strict=True))
    if not all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors) or (moving and _may_write(graph)):
        return None, graph(*inputs), set()
    aliases = [x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
    own = list(inputs)
    for i, x in zip(places, aliases, strict=True):
        own[i] = x
    writer = _Writer(aliases)
    with writer:
        outputs = graph(*own)
    found = list(outputs)
    own_leaves = {id(x) for x in aliases}
    differentiable = [
        i for i, x in enumerate(found) if isinstance(x, Tensor) and x.requires_grad and id(x) not in own_leaves
    ]
    leaves = [i for i, w in enumerate(wanted) if w]
    lists = None
    given = {i: places[k] for i, y in enumerate(found) for k, x in enumerate(aliases) if y is x}
    if writer.reason is None and _apart([y for i, y in enumerate(found) if i not in given], aliases):
        written = [places[i] for i, x in enumerate(aliases) if x.untyped_storage()._cdata in writer.written]
        lists = _lists(writer, places, aliases, found, differentiable, leaves, written, isinstance(outputs, list))
        if lists is not None:
            lists.given = given
    if differentiable:
        ends = [found[i] for i in differentiable]
        joined = _Bridged.apply(ends, [aliases[i] for i in leaves], *[tensors[i] for i in leaves])
        for i, x in zip(differentiable, joined, strict=True):
            found[i] = x
    for i, k in given.items():
        found[i] = inputs[k]
    reads = {places[i] for i in writer.reads}
    return lists, found if isinstance(outputs, list) else tuple(found), reads


def _may_write(graph: Any) -> bool:
    """Whether a graph may write to an input that is an activation, whose own autograd graph would be bypassed."""
    for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        flagged = any(x is True for x in (*node.args, node.kwargs.get("inplace"))) or "out" in node.kwargs
        if node.op.startswith("call") and (in_place or flagged or name.strip("_") in _IN_PLACE):
            return True
    return False


def _apart(outputs: list[Any], inputs: list[Tensor]) -> bool:
    """Whether outputs are plain tensors that share no memory with each other or an input."""
    if not all(type(x) is Tensor for x in outputs):
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
) -> _Lists | None:
    detached = [x.detach() for x in outputs]
    for x, d in zip(outputs, detached, strict=True):
        writer.known[id(d)] = writer.slot(x)
        writer.alive.append(d)
    at = [places[i] for i in leaves]

    def made(program: Program) -> _Lists:
        return _Lists(places, program, len(outputs), at, written, is_list)

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
    made: Callable[[Program], _Lists],
) -> _Lists | None:
    forward_calls, inputs, before = list(writer.calls), list(writer.inputs), writer.count
    ends = [outputs[i] for i in differentiable]
    cotangents = [torch.ones_like(x) for x in ends]
    given = [writer._new(x) for x in cotangents]
    writer.calls, writes = [], set(writer.written)
    with writer, torch.no_grad():
        found = torch.autograd.grad(
            ends, [aliases[i] for i in leaves], cotangents, retain_graph=True, allow_unused=True
        )
    if writer.reason is not None or writer.written != writes:
        return None
    grads = [None if g is None else writer.slot(g) for g in found]
    calls = writer.calls
    if any(_writes_to(call, before) for call in calls):
        return None
    read = {s for call in calls for s in slots_read(call)} | {s for s in grads if s is not None}
    saved = sorted(s for s in read if s < before)
    outs = [writer.slot(x) for x in detached]
    lists = made(Program(forward_calls, inputs, [*outs, *saved], writer.facts))
    lists.backward = Program(calls, [*saved, *given], grads, writer.facts)
    lists.differentiable, lists.strides = differentiable, [x.stride() for x in cotangents]
    return lists


def _writes_to(call: Any, before: int) -> bool:
    """Whether a call of the backward pass mutates a forward result, which a later replay may need."""
    func, args, _, _ = call
    return any(s < before for s in flat(_targets(func, args)) if isinstance(s, Slot))


def _targets(func: Any, args: Sequence[Any]) -> list[Any]:
    """Return the arguments that a call mutates."""
    return [
        given
        for argument, given in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
