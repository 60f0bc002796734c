"""Whether a critic is a plain MLP, and its layers: linear with (leaky) ReLU between them, in an ``nn.Sequential``.

Modules around it may have a forward that does nothing but call it.

Reading modules takes as long as computing a small layer, so what was read is kept for the critic. It is used again only
if everything that it was read from is found to be the same, which takes a few loops in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS = {nn.LeakyReLU: ("negative_slope",), nn.Flatten: ("start_dim", "end_dim")}
_wants_gradient, _dtype, _device = attrgetter("requires_grad"), attrgetter("dtype"), attrgetter("device")
_forward = attrgetter("forward")


def _hands_on(self: Any, x: Any) -> Any:
    return self.net(x)


def _hands_on_by_name(self: Any, x: Any) -> Any:
    out = self.net(x)
    return out


def _code_of(function: Any) -> tuple[Any, ...] | None:
    """All that a function of two arguments does, but for the names in it."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    counts = code.co_argcount, code.co_kwonlyargcount, code.co_nlocals, code.co_flags & 0xFF, len(code.co_names)
    return code.co_code, code.co_exceptiontable if hasattr(code, "co_exceptiontable") else b"", *counts


_HANDS_ON = (_code_of(_hands_on), _code_of(_hands_on_by_name))


def _handed_to(kind: type[nn.Module]) -> str | None:
    """The attribute that a class's forward calls on its input and does nothing else, told from its bytecode."""
    if kind.__getattr__ is not nn.Module.__getattr__ or kind.__getattribute__ is not object.__getattribute__:
        return None
    if _code_of(kind.forward) not in _HANDS_ON:
        return None
    name: str = kind.forward.__code__.co_names[0]
    return None if hasattr(kind, name) else name


class Layers:
    """What the op ``mlp_critic_step`` wants to know of a critic, and what it was read from."""

    def __init__(self, critic: nn.Module) -> None:
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []  # empty where there is none
        self.slopes: list[float] = []
        self.trained: list[Tensor] = []  # weights and biases that there are, in the order of the gradients
        self.places: list[int] = []  # of those among the gradients
        self.flattens = False
        self._modules: list[nn.Module] = []
        self.fit = self._read(critic) and len(self.slopes) == len(self.weights) - 1
        # Modules' own dictionaries, as their getattr is slow.
        self._own = [module.__dict__ for module in self._modules]
        self._types = [type(module) for module in self._modules]
        self._forwards = [kind.forward for kind in self._types]
        self._hooks = [own[name] for own in self._own for name in _HOOKS]
        self._settings = [(m.__dict__, n, getattr(m, n)) for m in self._modules for n in _SETTINGS.get(type(m), ())]
        self._contents = [own[kind] for own in self._own for kind in ("_modules", "_parameters") if own[kind]]
        self._lengths = [*map(len, self._contents)]
        self._values = [*chain.from_iterable(map(dict.values, self._contents))]

    def with_gradients(self, gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [(x, gradients[i]) for x, i in zip(self.trained, self.places, strict=True)]

    def current(self) -> bool:
        """Whether the critic still consists of what was read."""
        return (
            all(map(is_, map(type, self._modules), self._types))
            and all(map(is_, map(_forward, self._types), self._forwards))
            and [*map(len, self._contents)] == self._lengths
            and all(map(is_, chain.from_iterable(map(dict.values, self._contents)), self._values))
            and all(own[name] == value for own, name, value in self._settings)
        )

    def ready(self, x: Tensor) -> bool:
        """Whether nothing is attached to a module, and all weights are to be trained, in x's dtype, on its device."""
        return (
            not any(self._hooks)
            and not any("forward" in own for own in self._own)
            and all(map(_wants_gradient, self.trained))
            and {*map(_device, self.trained)} == {x.device}
            and {*map(_dtype, self.trained)} == {x.dtype}
        )

    def _read(self, module: nn.Module) -> bool:
        """Add a module's layers; False where there is anything but them."""
        self._modules.append(module)
        kind = type(module)
        if kind.__call__ is not nn.Module.__call__:
            return False
        if kind.forward is nn.Sequential.forward:
            return all(child is not None and self._read(child) for child in module._modules.values())
        if kind is nn.Linear:
            return self._read_linear(module._parameters)
        if kind is nn.ReLU or kind is nn.LeakyReLU:
            self.slopes.append(0.0 if kind is nn.ReLU else float(module.negative_slope))  # type: ignore[arg-type]
            return self.slopes[-1] >= 0 and len(self.slopes) == len(self.weights)
        if kind is nn.Flatten:
            self.flattens = True
            return bool(not self.weights and module.start_dim == 1 and module.end_dim == -1)
        if kind is nn.Identity:
            return True
        name = _handed_to(kind)
        inner = None if name is None or name in module.__dict__ else module._modules.get(name)
        return inner is not None and self._read(inner)

    def _read_linear(self, parameters: dict[str, Any]) -> bool:
        """Add a linear layer; False where it does not follow an activation, or is none of PyTorch's own."""
        if len(self.slopes) != len(self.weights) or parameters.keys() != {"weight", "bias"}:
            return False
        for place, tensor in enumerate((parameters["weight"], parameters["bias"])):
            if tensor is None and place:
                self.biases.append(self.weights[-1].new_empty(0))
                continue
            if type(tensor) is not nn.Parameter or (place and tensor.shape != self.weights[-1].shape[:1]):
                return False
            self.trained.append(tensor)
            self.places.append(2 * len(self.slopes) + place)
            (self.biases if place else self.weights).append(tensor)
        return True


_read: WeakKeyDictionary[nn.Module, Layers] = WeakKeyDictionary()


def layers_of(critic: Any, x: Tensor) -> Layers | None:
    """The critic's layers, if it is nothing but an MLP that is to be trained as a whole and takes this batch."""
    if not isinstance(critic, nn.Module) or x.dim() < 2:
        return None
    found = _read.get(critic)
    if found is None or not found.current():
        found = _read[critic] = Layers(critic)
    fits = found.fit and found.ready(x) and (x.dim() == 2 or found.flattens)
    return found if fits and found.weights[0].shape[1] * x.shape[0] == x.numel() else None
