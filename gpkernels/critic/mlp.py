"""The native way for an MLP: linear layers with (leaky) ReLU in an ``nn.Sequential``, a whole step in one op.

An ``nn.Flatten`` may come first.
The layers are read anew in every call. Whatever is not exactly such a critic is left to the tape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gpkernels import backends, ops
from gpkernels.critic.deliver import deliver
from gpkernels.critic.parts import Adversarial, Parts, Penalty

BATCHED_BELOW = 1 << 18  # elements of a group's widest activation


class Layers(NamedTuple):
    """What ``mlp_critic_step`` wants to know of a critic."""

    weights: list[Tensor]
    biases: list[Tensor]
    slopes: list[float]
    trained: list[Tensor]  # weights and biases that there are, in the order of the gradients
    kept: list[int]  # which gradients those are

    def with_gradients(self, gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [(x, gradients[i]) for x, i in zip(self.trained, self.kept, strict=True)]


def layers_of(critic: Any, inputs: Sequence[Tensor]) -> Layers | None:
    """The critic's layers if the native op can take it and these inputs, otherwise None."""
    x = inputs[0]
    if type(critic) is not nn.Sequential or x.dim() < 2 or not _native(x):
        return None
    found = Layers([], [], [], [], [])
    flattens = _read(critic, x.dtype, found)
    if flattens is None or (x.dim() > 2 and not flattens):
        return None
    weights, slopes = found.weights, found.slopes
    fits = weights and len(slopes) == len(weights) - 1 and weights[0].shape[1] * len(x) == x.numel()
    return found if fits else None


def _native(x: Tensor) -> bool:
    """Whether the op's kernel would run, and nothing is watching that it would hide from."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and backends.extension is not None
        and backends.forced() in (None, "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not _has_any_global_hook()
        and _get_current_function_mode() is None
        and _get_current_dispatch_mode() is None
    )


def _read(module: nn.Module, dtype: torch.dtype, found: Layers) -> bool | None:
    """Add a module's layers; None where there is anything but them, otherwise whether the input is flattened.

    Dictionaries, as nn.Module's getattr is slow.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    kind = type(module)
    if "forward" in own:
        return None
    if kind is nn.Sequential:
        flattens = False
        for child in own["_modules"].values():
            read = None if child is None else _read(child, dtype, found)
            if read is None:
                return None
            flattens |= read
        return flattens
    if kind is nn.Linear:
        return False if _read_linear(own["_parameters"], dtype, found) else None
    if kind is nn.ReLU or kind is nn.LeakyReLU:
        slope = 0.0 if kind is nn.ReLU else float(own["negative_slope"])
        found.slopes.append(slope)
        return False if slope >= 0 and len(found.slopes) == len(found.weights) else None
    if kind is nn.Flatten and not found.weights and own["start_dim"] == 1 and own["end_dim"] == -1:
        return True
    return False if kind is nn.Identity else None


def _read_linear(parameters: Mapping[str, Tensor | None], dtype: torch.dtype, found: Layers) -> bool:
    """Add a linear layer; False where it does not follow an activation or is not to be trained as a whole."""
    at = len(found.weights)
    if len(found.slopes) != at:
        return False
    if parameters.keys() != {"weight", "bias"} or parameters["weight"] is None:
        return False
    for place, tensor in enumerate((parameters["weight"], parameters["bias"])):
        if tensor is None:
            found.biases.append(found.weights[-1].new_empty(0))
            continue
        if type(tensor) is not nn.Parameter or not tensor.requires_grad:
            return False
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            return False
        if place and tensor.shape != found.weights[-1].shape[:1]:
            return False
        found.trained.append(tensor)
        found.kept.append(2 * at + place)
        (found.biases if place else found.weights).append(tensor)
    return True


def native_penalty(layers: Layers, points: Tensor, penalty: Penalty) -> Tensor:
    """The penalty of an MLP, by the op that does everything."""
    wanted = torch.is_grad_enabled()
    with torch.no_grad():
        options = (0, -1, -1, 0, 0, *penalty, wanted)
        _, value, gradients = ops.mlp_critic_step(
            [points.flatten(1)], layers.weights, layers.biases, layers.slopes, *options
        )
    return deliver(value, layers.with_gradients(gradients)) if wanted else value


def native_step(
    layers: Layers,
    groups: list[Tensor],
    plain: int,
    real: Tensor,
    fake: Tensor,
    adversarial: Adversarial,
    penalty: Penalty | None,
) -> Parts:
    """The whole loss of an MLP: one call of the op, or one for each group where activations are large."""
    wanted = torch.is_grad_enabled()
    penalty = penalty or Penalty(0.0, 0.0, False)
    widest = max(max(w.shape) for w in layers.weights)
    size = len(groups) if len(groups[0]) * widest < BATCHED_BELOW else 1
    parts: list[tuple[Tensor, Tensor]] = []
    sums: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(groups), size):
            some = groups[start : start + size]
            own, value, gradients = _call(layers, some, plain - start, real, fake, adversarial, penalty, wanted)
            parts.append((own, value))
            if sums:
                torch._foreach_add_(sums, gradients)
            sums = sums or gradients
        own, value = (
            parts[0] if len(parts) == 1 else (torch.stack(column).sum(0) for column in zip(*parts, strict=True))
        )
        loss = torch.add(own, value, alpha=penalty.weight)
    if wanted:
        loss = deliver(loss, layers.with_gradients(sums))
    return Parts(loss, own, value, torch.zeros_like(own))


def _call(
    layers: Layers,
    groups: list[Tensor],
    plain: int,
    real: Tensor,
    fake: Tensor,
    adversarial: Adversarial,
    penalty: Penalty,
    wanted: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The op on some groups, of which the first ``plain`` are plain, all if there are no more."""
    places = [next((i for i, group in enumerate(groups) if group is x), -1) for x in (real, fake)]
    options = (min(plain, len(groups)), *places, adversarial.real, adversarial.fake, *penalty, wanted)
    called: tuple[Tensor, Tensor, list[Tensor]] = ops.mlp_critic_step(
        [group.flatten(1) for group in groups], layers.weights, layers.biases, layers.slopes, *options
    )
    return called
