"""The native way for an MLP: linear layers with (leaky) ReLU in an ``nn.Sequential``, a whole step in one op.

An ``nn.Flatten`` may come first. Whatever is not exactly such a critic is left to the tape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gpkernels import backends, ops
from gpkernels.critic.deliver import deliver
from gpkernels.critic.mlp_layers import Layers, layers_of
from gpkernels.critic.parts import Adversarial, Between, Parts, Penalty


def native_layers(critic: Any, x: Tensor) -> Layers | None:
    """The critic's layers, if the op can take it and a batch like x and would run as a kernel."""
    if (
        x.dtype in (torch.float32, torch.float64)
        and backends.fuses_mlps(x.device.type)
        and not torch.is_autocast_enabled(x.device.type)
        and not _watched()
    ):
        return layers_of(critic, x)
    return None


def _watched() -> bool:
    """Whether anything looks on that the op would hide from; ``takes_whole_ops`` says that a mode wants what runs."""
    mode = _get_current_dispatch_mode()
    by_mode = mode is not None and not getattr(mode, "takes_whole_ops", False)
    return by_mode or _has_any_global_hook() or _get_current_function_mode() is not None


def native_penalty(layers: Layers, points: Tensor | Between, penalty: Penalty) -> Tensor:
    """The penalty of an MLP, by the op that does everything."""
    return _whole(layers, [], points, -1, -1, 0, 0, *penalty).loss


def native_step(
    layers: Layers,
    real: Tensor,
    fake: Tensor,
    points: Tensor | Between | None,
    adversarial: Adversarial,
    penalty: Penalty | None,
) -> Parts:
    """The whole loss of an MLP."""
    plain = [x for x in (real, fake) if x is not points]
    groups = [*plain, points]
    scored = (next((i for i, x in enumerate(groups) if x is one), -1) for one in (real, fake))
    options = (*scored, adversarial.real, adversarial.fake, *(penalty or Penalty(0.0, 0.0, False)))
    return _whole(layers, [_flat(x) for x in plain], points, *options)


def _whole(layers: Layers, plain: list[Tensor], points: Tensor | Between | None, *options: Any) -> Parts:
    """What the op gives, with the loss's gradients where they are wanted."""
    wanted = torch.is_grad_enabled()
    args = (plain, _rows(points), layers.weights, layers.biases, layers.slopes, *options, wanted)
    if wanted:
        parts = ops.mlp_critic_step.direct(*args, layers.trained, layers.places)
        if parts is not NotImplemented:
            return Parts(*parts)
    with torch.no_grad():
        values, gradients = ops.mlp_critic_step(*args)
    loss, *others = values.unbind()
    return Parts(deliver(loss, layers.with_gradients(gradients)) if wanted else loss, *others)


def _rows(points: Tensor | Between | None) -> list[Tensor]:
    """Points as the op takes them."""
    if points is None:
        return []
    if isinstance(points, Between):
        return [_flat(points.real), _flat(points.fake), points.eps_or_key]
    return [_flat(points)]


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(1)
