"""LayerNorm, GroupNorm, InstanceNorm, RMSNorm: n = (x - mean) r over a group, then an affine map by channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels import ops
from gpkernels.critic.tape import Node, NoRule, Tape, cast

aten = torch.ops.aten


class Normalise(Node):
    """``grouped``: a batch as (N, groups, M); ``normal``: that, normalised; ``mean``, ``inverse``: (N, groups, 1)."""

    curved = True

    def __init__(self, grouped: Tensor, normal: Tensor, mean: Tensor | None, inverse: Tensor) -> None:
        self.grouped, self.normal, self.mean, self.inverse = grouped, normal, mean, inverse
        self.groups, self.centred = grouped.shape[1], mean is not None

    def jacobian(self, u: Tensor, rows: slice) -> Tensor:
        n, r, c = self.normal[rows], self.inverse[rows], self._grouped(u)
        if self.mean is not None:  # J is symmetric, so the backward of a layer norm without weights goes both ways
            shape, mask = [n.shape[-1]], [True, False, False]
            return aten.native_layer_norm_backward(
                c.contiguous(), self.grouped[rows], shape, self.mean[rows], r, None, None, mask
            )[0].reshape(u.shape)
        return (r * (c - n * (n * c).mean(-1, keepdim=True))).reshape(u.shape)

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (self.jacobian(cotangent, rows),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else self.jacobian(t, rows)

    def curvature(self, tangents: Sequence[Tensor | None], cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        (tangent,) = tangents
        if tangent is None:
            return (None,)
        t, d = self._grouped(tangent), self._grouped(cotangent)
        bent = ops.normalise_curvature(self.normal[rows], self.inverse[rows], t, d, self.centred)
        return (bent.reshape(tangent.shape),)

    def _grouped(self, u: Tensor) -> Tensor:
        return cast(u, self.normal).reshape(u.shape[0], self.groups, -1)


class Affine(Node):
    """y = n w + b, w and b shaped to broadcast against a row."""

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> None:
        self.x, self.weight, self.bias, self.shape = x, weight, bias, tuple(shape)

    def _scaled(self, u: Tensor) -> Tensor:
        return u if self.weight is None else u * self.weight.reshape(self.shape).to(u.dtype)

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (self._scaled(cotangent),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else self._scaled(t)

    def add_weight_gradient(self, tape: Tape, cotangent: Tensor, operand: Tensor, rows: slice) -> None:
        if self.weight is not None and self.weight.requires_grad:
            tape.gradients.add(self.weight, self._summed(cotangent * operand, self.weight))

    def add_bias_gradient(self, tape: Tape, cotangent: Tensor) -> None:
        if self.bias is not None and self.bias.requires_grad:
            tape.gradients.add(self.bias, self._summed(cotangent, self.bias))

    def _summed(self, u: Tensor, like: Tensor) -> Tensor:
        kept = (1,) * (u.dim() - len(self.shape)) + self.shape
        return u.sum([axis for axis, size in enumerate(kept) if size == 1]).reshape(like.shape)


def _record(
    tape: Tape,
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    eps: float,
    centred: bool = True,
) -> Tensor:
    """Normalise ``groups`` groups of each row, then scale; in float32 under autocast, as PyTorch does."""
    weight_, bias_ = tape.weight(weight, "weight"), tape.weight(bias, "bias")
    x = input.detach()
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    grouped = tape.keep(x.reshape(x.shape[0], groups, -1))
    mean = None
    if centred:
        normal, mean, inverse = aten.native_layer_norm(grouped, [grouped.shape[-1]], None, None, eps)
    else:
        inverse = (grouped.square().mean(-1, keepdim=True) + eps).rsqrt_()
        normal = grouped * inverse
    node = Normalise(grouped, normal, mean, inverse)
    normal = tape.keep(tape.add(node, (input,), normal.reshape(x.shape)))
    if weight is None and bias is None:
        return normal
    if weight is None:
        output = normal + bias.reshape(shape)  # type: ignore[union-attr]  # one of them is there
    elif bias is None:
        output = normal * weight.reshape(shape)
    else:
        output = torch.addcmul(bias.reshape(shape), normal, weight.reshape(shape))
    output = cast(output, x)
    return tape.add(Affine(normal, weight, bias, shape), (normal,), output, weight_, bias_)


def _trailing(input: Tensor, shape: Sequence[int]) -> int:
    if len(shape) >= input.dim():
        raise NoRule("a norm over the batch axis")
    return int(input[0].numel() // max(1, int(torch.Size(shape).numel())))


def record_layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _record(tape, input, _trailing(input, normalized_shape), weight, bias, normalized_shape, eps)


def record_rms_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if torch.is_autocast_enabled(input.device.type) or input.dtype not in (torch.float32, torch.float64):
        raise NoRule("rms_norm in low precision")
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _record(tape, input, _trailing(input, normalized_shape), weight, None, normalized_shape, eps, False)


def _channels(input: Tensor) -> list[int]:
    return [input.shape[1], *[1] * (input.dim() - 2)]


def record_group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _record(tape, input, num_groups, weight, bias, _channels(input), eps)


def record_instance_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or running_var is not None or not use_input_stats:
        raise NoRule("instance_norm with running statistics")
    return _record(tape, input, input.shape[1], weight, bias, _channels(input), eps)


RULES: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: record_layer_norm,
    F.rms_norm: record_rms_norm,
    F.group_norm: record_group_norm,
    F.instance_norm: record_instance_norm,
}
