"""LayerNorm, GroupNorm, InstanceNorm, RMSNorm: n = (x - mean) r over a group, then an affine map by channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels import ops
from gpkernels.critic.structure import layout_of
from gpkernels.critic.tape import Node, NoRule, Tape, cast

aten = torch.ops.aten


class Groups:
    """A batch as (N, groups, M) and back. A group that is a whole row is taken in the order it lies in memory."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.groups = groups
        self.last = groups == 1 and layout_of(x) is torch.channels_last

    def split(self, u: Tensor) -> Tensor:
        return (u.permute(0, 2, 3, 1) if self.last else u).reshape(u.shape[0], self.groups, -1)

    def join(self, u: Tensor, like: Tensor) -> Tensor:
        if not self.last:
            return u.reshape(like.shape)
        n, c, h, w = like.shape
        return u.reshape(n, h, w, c).permute(0, 3, 1, 2)


class Normalise(Node):
    """``grouped``: a batch as (N, groups, M); ``normal``: that, normalised; ``mean``, ``inverse``: (N, groups, 1)."""

    curved = True

    def __init__(self, groups: Groups, grouped: Tensor, normal: Tensor, mean: Tensor | None, inverse: Tensor) -> None:
        self.groups, self.grouped, self.normal, self.mean, self.inverse = groups, grouped, normal, mean, inverse
        self.centred = mean is not None

    def jacobian(self, u: Tensor, rows: slice) -> Tensor:
        n, r, c = self.normal[rows], self.inverse[rows], self._grouped(u)
        if self.mean is not None:  # J is symmetric, so the backward of a layer norm without weights goes both ways
            shape, mask = [n.shape[-1]], [True, False, False]
            there = aten.native_layer_norm_backward(
                c.contiguous(), self.grouped[rows], shape, self.mean[rows], r, None, None, mask
            )[0]
        else:
            there = r * (c - n * (n * c).mean(-1, keepdim=True))
        return self.groups.join(there, u)

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
        return (self.groups.join(bent, tangent),)

    def _grouped(self, u: Tensor) -> Tensor:
        return self.groups.split(cast(u, self.normal))


class Affine(Node):
    """y = n w + b, w and b shaped to broadcast against a row; ``factor`` is w so."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, factor: Tensor | None, bias: Tensor | None, shape: Sequence[int]
    ) -> None:
        self.x, self.weight, self.factor, self.bias, self.shape = x, weight, factor, bias, tuple(shape)
        self.elements = int(torch.Size(shape).numel())
        self.whole = x.shape[x.dim() - len(self.shape) :] == self.shape  # else one for each channel, axis 1
        self.last = layout_of(x) is torch.channels_last and (not self.whole or len(self.shape) == 3)

    def _scaled(self, u: Tensor) -> Tensor:
        return u if self.factor is None else u * cast(self.factor, u)

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (self._scaled(cotangent),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else self._scaled(t)

    def add_weight_gradient(self, tape: Tape, cotangent: Tensor, operand: Tensor, rows: slice) -> None:
        self._add(tape, cotangent, operand, self.weight, None)

    def add_bias_gradient(self, tape: Tape, cotangent: Tensor) -> None:
        self._add(tape, cotangent, cotangent, None, self.bias)

    def add_gradients(self, tape: Tape, cotangent: Tensor, rows: slice) -> None:
        self._add(tape, cotangent, self.x[rows], self.weight, self.bias)

    def _add(self, tape: Tape, cotangent: Tensor, operand: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        wanted = [(w, i) for i, w in enumerate((weight, bias)) if w is not None and w.requires_grad]
        if not wanted:
            return
        sums = ops.affine_gradients(self._spread(cotangent), self._spread(cast(operand, cotangent)))
        for w, i in wanted:
            tape.gradients.add(w, self._gathered(sums[i], w))

    def _spread(self, u: Tensor) -> Tensor:
        """(R, K, I), weights having K elements, with no copy where it can be helped."""
        if self.last:
            u = u.permute(0, 2, 3, 1)
            return u.reshape(u.shape[0] if self.whole else -1, self.elements, 1)
        return u.reshape(-1, self.elements, 1) if self.whole else u.reshape(len(u), self.elements, -1)

    def _gathered(self, sums: Tensor, like: Tensor) -> Tensor:
        if self.last and self.whole:
            c, h, w = self.shape
            sums = sums.reshape(h, w, c).permute(2, 0, 1)
        return sums.reshape(like.shape)


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
    into = Groups(x, groups)
    grouped = tape.keep(into.split(x))
    mean = None
    if centred:
        normal, mean, inverse = aten.native_layer_norm(grouped, [grouped.shape[-1]], None, None, eps)
    else:
        inverse = (grouped.square().mean(-1, keepdim=True) + eps).rsqrt_()
        normal = grouped * inverse
    node = Normalise(into, grouped, normal, mean, inverse)
    normal = tape.keep(tape.add(node, (input,), into.join(normal, x)))
    if weight is None and bias is None:
        return normal
    factor, shift = (None if w is None else _in_order(w.detach().reshape(shape), x) for w in (weight, bias))
    if factor is None:
        output = normal + shift  # type: ignore[operator]  # one of them is there
    else:
        output = normal * factor if shift is None else torch.addcmul(shift, normal, factor)
    output = cast(output, x)
    return tape.add(Affine(normal, weight, factor, bias, shape), (normal,), output, weight_, bias_)


def _in_order(weight: Tensor, like: Tensor) -> Tensor:
    """An image's weight in the order in which the images lie in memory."""
    if weight.dim() < 3:
        return weight
    return weight[None].contiguous(memory_format=layout_of(like))[0]


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
