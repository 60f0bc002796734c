"""Whether a critic is a plain MLP, and its layers: linear with (leaky) ReLU between them, in an ``nn.Sequential``.

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


class Layers:
    """What the op ``mlp_critic_step`` wants to know of a critic, and what it was read from."""

    def __init__(self, critic: nn.Sequential) -> None:
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
        if kind is nn.Sequential:
            return all(child is not None and self._read(child) for child in module._modules.values())
        if kind is nn.Linear:
            return self._read_linear(module._parameters)
        if kind is nn.ReLU or kind is nn.LeakyReLU:
            self.slopes.append(0.0 if kind is nn.ReLU else float(module.negative_slope))  # type: ignore[arg-type]
            return self.slopes[-1] >= 0 and len(self.slopes) == len(self.weights)
        if kind is nn.Flatten:
            self.flattens = True
            return bool(not self.weights and module.start_dim == 1 and module.end_dim == -1)
        return kind is nn.Identity

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


_read: WeakKeyDictionary[nn.Sequential, Layers] = WeakKeyDictionary()


def layers_of(critic: Any, x: Tensor) -> Layers | None:
    """The critic's layers, if it is nothing but an MLP that is to be trained as a whole and takes this batch."""
    if type(critic) is not nn.Sequential or x.dim() < 2:
        return None
    found = _read.get(critic)
    if found is None or not found.current():
        found = _read[critic] = Layers(critic)
    fits = found.fit and found.ready(x) and (x.dim() == 2 or found.flattens)
    return found if fits and found.weights[0].shape[1] * x.shape[0] == x.numel() else None
