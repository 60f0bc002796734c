"""Which way each layer of a critic takes, and why: `gpkernels explain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpkernels.critic.mlp import native_layers
from gpkernels.critic.record import scores_of
from gpkernels.critic.registry import RULES
from gpkernels.critic.tape import HARMLESS, NoRule, Tape, name_of, unwrapped
from gpkernels.ops import check_batch


@dataclass(frozen=True)
class Call:
    """One call of the critic: the layer it belongs to, the function, the way it takes, FLOPs of products in it."""

    layer: str
    function: str
    way: str
    flops: int


@dataclass(frozen=True)
class Explanation:
    """Calls in order; the way of the whole critic; FLOPs of a gradient penalty with its weight gradients."""

    calls: list[Call]
    way: str
    eager_flops: int
    flops: int

    def __str__(self) -> str:
        rows = [("layer", "call", "way", "MFLOP")]
        rows += [(c.layer or "(critic)", c.function, c.way, f"{c.flops / 1e6:.3f}") for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)) + "  " + row[3] for row in rows]
        forward = sum(c.flops for c in self.calls)
        passes = (f"{count / max(1, forward):.2f} L" for count in (self.eager_flops, self.flops))
        eager, ours = passes
        total = f"penalty with weight gradients: {eager} in eager PyTorch, {ours} here; L = {forward / 1e6:.3f} MFLOP"
        return "\n".join([*lines, "", f"the critic: {self.way}", total])


class _Flops(TorchDispatchMode):
    """FLOPs of products and convolutions, by PyTorch's own registry."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # it imports Triton, which importing this must not

        super().__init__()
        self.total, self.registry = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self.registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class _Watching(Tape):
    """A tape that goes on after a call without a rule, and writes down why there is none."""

    def __init__(self, x: Tensor, layer: Callable[[], str]) -> None:
        super().__init__(RULES, x)
        self.layer = layer
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func not in self.rules and func in HARMLESS) or not self._involved(args, kwargs):
            return func(*args, **kwargs)
        before = len(self.nodes)
        with _Flops() as flops:
            try:
                output = super().__torch_function__(func, types, args, kwargs)
                curved = any(node.curved for node in self.nodes[before:])
                way = "rule, with curvature" if curved else "rule"
            except NoRule as reason:
                way = f"PyTorch: {reason}"
                output = func(*args, **kwargs)
                self._go_on_from(output)
        self.calls.append(Call(self.layer(), name_of(func).rpartition(".")[2], way, flops.total))
        return output

    def _go_on_from(self, output: Any) -> None:
        for x in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.shape[0] == self.rows:
                self.restart(x)


def explain(critic: Callable[..., Any], example: Tensor) -> Explanation:
    """Call the critic on an example batch and say which way each of its layers takes in a penalty, and why.

    critic: a module or a callable; example: (N, *), as the critic is called in training. ``str`` of it is a table. The
    critic's buffers and the random numbers it draws are given back. Raises TypeError or ValueError for bad input.
    """
    check_batch("example", example)
    if not callable(critic):
        raise TypeError(f"critic: expected a module or a callable, got {type(critic).__name__}")
    critic = unwrapped(critic)
    with _as_it_was(critic):
        return _explained(critic, example)


@contextmanager
def _as_it_was(critic: Callable[..., Any]) -> Iterator[None]:
    """Give back random numbers and buffers, such as running statistics."""
    buffers = list(critic.buffers()) if isinstance(critic, nn.Module) else []
    values = [b.detach().clone() for b in buffers]
    with torch.random.fork_rng(devices=[]):
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def _explained(critic: Callable[..., Any], example: Tensor) -> Explanation:
    stack: list[str] = [""]
    hooks = _follow(critic, stack) if isinstance(critic, nn.Module) else []
    try:
        tape = _Watching(example.detach(), lambda: stack[-1])
        with torch.enable_grad(), tape:
            scores_of(critic(tape.x))
    finally:
        for hook in hooks:
            hook.remove()
    native = native_layers(critic, example) is not None
    eager, ours = _penalty_flops(critic, example)
    return Explanation(tape.calls, _way(tape.calls, native), eager, ours)


def _follow(critic: nn.Module, stack: list[str]) -> list[Any]:
    """Hooks that keep the name of the module at work on top of the stack."""

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = []
    for name, module in critic.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks


def _way(calls: list[Call], native: bool) -> str:
    if native:
        return "native: an MLP, the whole step is one op"
    if all(call.way.startswith("rule") for call in calls):
        return "recorded: every call has a rule"
    return "left to PyTorch's double backward, with layers that send no zeros where there are such"


def _penalty_flops(critic: Callable[..., Any], example: Tensor) -> tuple[int, int]:
    """Counted: a zero-centred penalty with its weight gradients, by eager PyTorch and by this library."""
    from gpkernels.penalties import r1_penalty  # it is built on this package

    weights = [p for p in critic.parameters() if p.requires_grad] if isinstance(critic, nn.Module) else []

    def eager() -> Tensor:
        x = example.detach().requires_grad_()
        (grad,) = torch.autograd.grad(scores_of(critic(x)).sum(), x, create_graph=True)
        return grad.flatten(1).square().sum(1).mean()

    totals = []
    for penalty in (eager, lambda: r1_penalty(critic, example)):
        penalty()  # what is refused once is refused at once from then on
        with _Flops() as flops:
            value = penalty()
            if weights and value.requires_grad:
                torch.autograd.grad(value, weights, allow_unused=True)
        totals.append(flops.total)
    return totals[0], totals[1]
