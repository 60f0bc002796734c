"""The modules of a critic, and the layers and functions that the nodes of autograd's graph originate from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, resolve_name

from gpkernels.critic.graph import LEAF
from gpkernels.critic.uncompiled import uncompiled
from gpkernels.ops.scaled_dot_product_attention import register_flops
from gpkernels.private import TorchDispatchMode, tree_leaves, without_function_modes


def modules_of(critic: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a critic consists of or refers to, by name; the critic itself is named ""."""
    if isinstance(critic, nn.Module):
        yield "", critic
        return
    owner = getattr(critic, "__self__", None)
    if isinstance(owner, nn.Module):  # a method
        yield "", owner
        return
    held: dict[str, Any] = {}
    if isinstance(critic, partial):
        yield from modules_of(critic.func)
        held = {**{str(i): x for i, x in enumerate(critic.args)}, **critic.keywords}
    elif inspect.isfunction(critic):
        seen = inspect.getclosurevars(critic)
        held = {**seen.globals, **seen.nonlocals}
    else:
        held = getattr(critic, "__dict__", {})
    yield from ((name, x) for name, x in held.items() if isinstance(x, nn.Module))


@contextmanager
def restored(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Context manager that restores random number generators and buffers, such as running statistics."""
    found = {id(m): m for module in modules for m in module.modules()}
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in found.values()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    devices = [device] if device.type not in ("cpu", "meta") else []
    kind = device.type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in kept:
                if not torch.equal(buffer, value):  # a write would invalidate graphs that saved the buffer
                    buffer.copy_(value)
                buffers[name] = buffer


def names_of(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Return the name of each module and submodule except compiled ones, whose hooks would be compiled, too."""
    found: dict[nn.Module, str] = {}
    for prefix, module in modules.items():
        for name, inner in module.named_modules(prefix=prefix):
            if "_orig_mod" not in name.split("."):
                found.setdefault(inner, name)
    return found


class Flops(TorchDispatchMode):
    """FLOPs of products and convolutions, as PyTorch's registry counts them."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # deferred, as it imports Triton

        register_flops()
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


class Claim:
    """Nodes that one function made in one layer; function: "" if none was observed."""

    def __init__(self, number: int, layer: str, function: str, flops: int) -> None:
        self.number, self.layer, self.function, self.flops = number, layer, function, flops


class Follow(TorchFunctionMode):
    """Maps nodes of autograd's graph to the layer that ran and the function that was called when they appeared."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.claims: dict[Any, Claim] = {}
        self._stack, self._count, self._claimed = [""], 0, 0
        self._flops = Flops()

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
        """Context manager with hooks that keep the name of the running module on top of the stack."""

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
            if scripted:  # they accept no hooks of their own
                hooks.callback(register_module_forward_pre_hook(partial(if_scripted, enter)).remove)
                hooks.callback(register_module_forward_hook(partial(if_scripted, leave), always_call=True).remove)
            for module in self.names:
                if module not in scripted:
                    hooks.callback(module.register_forward_pre_hook(enter).remove)
                    hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.claim((args, kwargs))  # nodes of custom functions, which no mode observes
        out = func(*args, **kwargs)
        self.claim((args, kwargs, out), _name_of(func))  # an in-place call gives an argument a new node
        return out

    def claim(self, values: Any, function: str = "") -> None:
        """Attribute nodes that lead to some tensors, and are not attributed yet, to the running layer."""
        fresh: list[Any] = []
        with without_function_modes():
            for x in tree_leaves(values):
                if isinstance(x, Tensor):
                    self._walk([y.grad_fn for y in (x, x._base) if y is not None], fresh)
        if fresh:
            claim = Claim(self._count, self._stack[-1], function, self._flops.total - self._claimed)
            self._count, self._claimed = self._count + 1, self._flops.total
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
