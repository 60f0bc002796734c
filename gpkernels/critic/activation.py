"""Element-wise activations: y = f(x). Pull and push are the same product with f'(x); curvature is f''(x) t delta.

Piecewise-linear ones have no curvature; PyTorch's double backward sends exact zeros down the whole network for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.critic.tape import ALL_ROWS, Node, NoRule, Tape

aten = torch.ops.aten
Elementwise = Callable[[Tensor, Tensor], Tensor]


class Activation(Node):
    """``slope(c, saved)`` is c f'(x); ``bend(c, saved)`` is c f''(x), or None where f'' = 0."""

    def __init__(self, saved: Tensor, slope: Elementwise, bend: Elementwise | None) -> None:
        self.saved, self.slope, self.bend = saved, slope, bend
        self.curved = bend is not None

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (self.slope(cotangent, self.saved if rows == ALL_ROWS else self.saved[rows]),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else self.slope(t, self.saved[rows])

    def curvature(self, tangents: Sequence[Tensor | None], cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        (t,) = tangents
        return (None if t is None or self.bend is None else self.bend(t * cotangent, self.saved[rows]),)


class PReLU(Activation):
    """Leaky ReLU with a learned slope for negative x, one or one per channel."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.weight = weight
        wide = weight.reshape(1, -1, *[1] * (x.dim() - 2)) if weight.numel() > 1 else weight.reshape(())
        self.x = x
        super().__init__(x, lambda c, x: torch.where(x > 0, c, c * wide.to(c.dtype)), None)

    def add_weight_gradient(self, tape: Tape, cotangent: Tensor, operand: Tensor, rows: slice) -> None:
        by_element = torch.where(self.saved[rows] > 0, 0.0, cotangent * operand)
        x = self.saved
        axes = [axis for axis in range(x.dim()) if axis != 1] if self.weight.numel() > 1 else list(range(x.dim()))
        tape.gradients.add(self.weight, by_element.sum(axes).reshape(self.weight.shape))


def _tanh_bend(c: Tensor, y: Tensor) -> Tensor:
    return -2 * c * y * (1 - y * y)


def _sigmoid_bend(c: Tensor, y: Tensor) -> Tensor:
    return c * y * (1 - y) * (1 - 2 * y)


def _silu_bend(c: Tensor, x: Tensor) -> Tensor:
    s = x.sigmoid()
    return c * s * (1 - s) * (2 + x * (1 - 2 * s))


def _gelu_bend(c: Tensor, x: Tensor) -> Tensor:
    return c * (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_bend(c: Tensor, x: Tensor) -> Tensor:
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    u, du, ddu = k * (x + cubic * x**3), k * (1 + 3 * cubic * x * x), 6 * k * cubic * x
    t = u.tanh()
    sech2 = 1 - t * t
    return c * (sech2 * du + 0.5 * x * sech2 * (ddu - 2 * t * du * du))


def piecewise(name: str, *constants: float) -> tuple[Elementwise, bool]:
    """The slope of a piecewise-linear activation, and whether it reads the output (else the input)."""
    if name == "relu":
        return (lambda c, y: aten.threshold_backward(c, y, 0)), True
    if name == "leaky_relu_of_input":
        return (lambda c, x: aten.leaky_relu_backward(c, x, constants[0], False)), False
    if name == "leaky_relu":
        (negative,) = constants
        from_output = negative > 0  # the sign of y is that of x
        return (lambda c, saved: aten.leaky_relu_backward(c, saved, negative, from_output)), from_output
    low, high = constants  # y lies strictly between them exactly where x does
    return (lambda c, y: aten.hardtanh_backward(c, y, low, high)), True


def smooth(name: str, *constants: Any) -> tuple[Elementwise, Elementwise, bool]:
    """Slope, bend and whether they read the output, of a smooth activation."""
    if name == "tanh":
        return aten.tanh_backward.default, _tanh_bend, True
    if name == "sigmoid":
        return aten.sigmoid_backward.default, _sigmoid_bend, True
    if name == "silu":
        return aten.silu_backward.default, _silu_bend, False
    if name == "gelu":
        (kind,) = constants
        bend = _gelu_tanh_bend if kind == "tanh" else _gelu_bend
        return (lambda c, x: aten.gelu_backward(c, x, approximate=kind)), bend, False
    (alpha,) = constants  # elu

    def elu_bend(c: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 0, 0.0, c * alpha * x.clamp(max=0).exp())

    return (lambda c, x: aten.elu_backward(c, alpha, 1, 1, False, x)), elu_bend, False


def _record(
    tape: Tape, x: Tensor, y: Tensor, slope: Elementwise, bend: Elementwise | None, from_output: bool
) -> Tensor:
    saved = y if from_output else x
    if not from_output and y is x:
        raise NoRule("an activation in place that overwrites the input it needs")
    output = tape.add(Activation(saved, slope, bend), (x,), y)
    tape.keep(saved)
    return output


def _record_piecewise(tape: Tape, x: Tensor, y: Tensor, name: str, *constants: float) -> Tensor:
    slope, from_output = piecewise(name, *constants)
    return _record(tape, x, y, slope, None, from_output)


def record_relu(tape: Tape, input: Tensor, inplace: bool = False) -> Tensor:
    return _record_piecewise(tape, input, torch.relu_(tape.writable(input)) if inplace else torch.relu(input), "relu")


def record_leaky_relu(tape: Tape, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if inplace and negative_slope <= 0:
        raise NoRule("leaky_relu in place with a slope that hides the sign")
    y = F.leaky_relu(tape.writable(input) if inplace else input, negative_slope, inplace)
    return _record_piecewise(tape, input, y, "leaky_relu", negative_slope)


def record_hardtanh(
    tape: Tape, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    y = F.hardtanh(tape.writable(input) if inplace else input, min_val, max_val, inplace)
    return _record_piecewise(tape, input, y, "hardtanh", min_val, max_val)


def record_relu6(tape: Tape, input: Tensor, inplace: bool = False) -> Tensor:
    return record_hardtanh(tape, input, 0.0, 6.0, inplace)


def record_prelu(tape: Tape, input: Tensor, weight: Tensor) -> Tensor:
    weight_ = tape.weight(weight, "weight")
    return tape.add(PReLU(tape.keep(input), weight), (input,), F.prelu(input, weight), weight_)


def _smooth_rule(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def record(tape: Tape, input: Tensor, **options: Any) -> Tensor:
        if options.get("inplace"):
            raise NoRule(f"{name} in place")
        slope, bend, from_output = smooth(name)
        return _record(tape, input, function(input), slope, bend, from_output)

    return record


def record_gelu(tape: Tape, input: Tensor, approximate: str = "none") -> Tensor:
    return _record(tape, input, F.gelu(input, approximate=approximate), *smooth("gelu", approximate))


def record_softplus(tape: Tape, input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    # f' = sigmoid(beta x) is kept instead of x: one exponential serves every pass. Beyond the threshold f is x.
    inner = input * beta
    slope = inner.sigmoid().masked_fill_(inner > threshold, 1.0)

    def bend(c: Tensor, slope: Tensor) -> Tensor:
        bent = c.mul(slope).mul_(beta)
        return bent.addcmul_(bent, slope, value=-1)

    output = tape.add(Activation(slope, torch.mul, bend), (input,), F.softplus(input, beta, threshold))
    tape.keep(slope)
    return output


def record_elu(tape: Tape, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    if inplace:
        raise NoRule("elu in place")
    return _record(tape, input, F.elu(input, alpha), *smooth("elu", alpha))


_RELU_IN_PLACE = (torch.relu_, torch.Tensor.relu_)
RULES: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), record_relu),
    **dict.fromkeys(_RELU_IN_PLACE, lambda tape, input: record_relu(tape, input, True)),
    F.leaky_relu: record_leaky_relu,
    F.hardtanh: record_hardtanh,
    F.relu6: record_relu6,
    **dict.fromkeys((F.prelu, torch.prelu, torch.Tensor.prelu), record_prelu),
    **dict.fromkeys((F.tanh, torch.tanh, torch.Tensor.tanh), _smooth_rule("tanh", torch.tanh)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.Tensor.sigmoid), _smooth_rule("sigmoid", torch.sigmoid)),
    F.silu: _smooth_rule("silu", F.silu),
    F.gelu: record_gelu,
    F.softplus: record_softplus,
    F.elu: record_elu,
}
