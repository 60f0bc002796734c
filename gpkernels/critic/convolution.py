"""Convolutions of one to three dimensions, plain and transposed, with any stride, padding, dilation and groups.

Images go through oneDNN's kernels of stride 1 in channels-last order, which saves a reordering in every call; those of
other strides gain nothing. What lies between convolutions keeps the order.

All four products are one ATen primitive or its backward with a mask, which computes what is asked for and no more;
PyTorch's double backward of a convolution builds the weight's gradient from a convolution with swapped roles instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpkernels.critic.tape import Node, NoRule, Tape, cast

_backward = torch.ops.aten.convolution_backward.default


class Geometry(NamedTuple):
    """What a convolution is besides its tensors."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class Convolution(Node):
    """``used``: the weight in the dtype and order of the forward call."""

    def __init__(self, x: Tensor, weight: Tensor, used: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
        self.x, self.weight, self.used, self.bias, self.geometry = x, weight, used, bias, geometry

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (input_gradient(cotangent, self.x[rows], cast(self.used, cotangent), self.geometry),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else torch.convolution(t, cast(self.used, t), None, *self.geometry)

    def add_weight_gradient(self, tape: Tape, cotangent: Tensor, operand: Tensor, rows: slice) -> None:
        if self.weight.requires_grad:
            operand = cast(operand, cotangent)
            gradient = weight_gradient(cotangent, operand, cast(self.used, cotangent), self.geometry)
            self._add(tape, gradient)

    def add_bias_gradient(self, tape: Tape, cotangent: Tensor) -> None:
        if self.bias is not None and self.bias.requires_grad:
            tape.gradients.add(self.bias, cotangent.sum((0, *range(2, cotangent.dim()))))

    def add_gradients(self, tape: Tape, cotangent: Tensor, rows: slice) -> None:
        if self.bias is None or not (self.weight.requires_grad and self.bias.requires_grad):
            super().add_gradients(tape, cotangent, rows)
            return
        x, used = cast(self.x[rows], cotangent), cast(self.used, cotangent)
        sizes, mask = list(self.bias.shape), [False, True, True]
        _, weight, bias = _backward(cotangent, x, used, sizes, *self.geometry, mask)
        self._add(tape, weight)
        tape.gradients.add(self.bias, bias)

    def _add(self, tape: Tape, gradient: Tensor) -> None:
        """A weight's gradient, in the weight's own order."""
        strides = self.weight.stride()
        own = gradient if gradient.stride() == strides else torch.empty_like(self.weight).copy_(gradient)
        tape.gradients.add(self.weight, own)


def input_gradient(cotangent: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of the input; x gives its shape alone."""
    gradient: Tensor = _backward(cotangent, x, weight, None, *geometry, [True, False, False])[0]
    return gradient


def weight_gradient(cotangent: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of the weight, which gives its shape alone."""
    gradient: Tensor = _backward(cotangent, x, weight, None, *geometry, [False, True, False])[1]
    return gradient


def geometry_of(
    weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool, output_padding: Any = 0
) -> Geometry:
    """A function's arguments as ATen's; NoRule for padding="same" that is not symmetric."""
    dims = weight.dim() - 2

    def each(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    if isinstance(padding, str):
        totals = [
            0 if padding == "valid" else d * (k - 1) for d, k in zip(each(dilation), weight.shape[2:], strict=True)
        ]
        if any(total % 2 for total in totals):
            raise NoRule("padding='same' is not symmetric for an even kernel")
        padding = [total // 2 for total in totals]
    return Geometry(each(stride), each(padding), each(dilation), transposed, each(output_padding), groups)


def _record(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    weight_, bias_ = tape.weight(weight, "weight"), tape.weight(bias, "bias")
    if input.dim() != weight.dim():
        raise NoRule("a convolution without a batch axis")
    x, used, narrow = input.detach(), weight.detach(), None if bias is None else bias.detach()
    device = input.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        x, used, narrow = x.to(dtype), used.to(dtype), None if narrow is None else narrow.to(dtype)
    if _goes_channels_last(x, geometry):
        x, used = (t.contiguous(memory_format=torch.channels_last) for t in (x, used))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        output = torch.convolution(x, used, narrow, *geometry)
    return tape.add(Convolution(tape.keep(x), weight, used, bias, geometry), (input,), output, weight_, bias_)


def _goes_channels_last(x: Tensor, geometry: Geometry) -> bool:
    plain = x.dim() == 4 and geometry.groups == 1 and not geometry.transposed and max(geometry.stride) == 1
    return plain and x.device.type == "cpu" and x.dtype != torch.float64 and torch.backends.mkldnn.is_available()


def record_convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    return _record(tape, input, weight, bias, geometry_of(weight, stride, padding, dilation, groups, False))


def record_transposed(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    geometry = geometry_of(weight, stride, padding, dilation, groups, True, output_padding)
    return _record(tape, input, weight, bias, geometry)


RULES: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), record_convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), record_transposed),
}
