"""Linear: y = x W^T + b over the last axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from gpkernels.critic.tape import Node, NoRule, Tape, cast


class Linear(Node):
    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self.weight, self.bias = x, weight, bias

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        return (torch.matmul(cotangent, cast(self.weight, cotangent)),)

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        (t,) = tangents
        return None if t is None else linear(t, cast(self.weight, t))

    def add_weight_gradient(self, tape: Tape, cotangent: Tensor, operand: Tensor, rows: slice) -> None:
        if not self.weight.requires_grad:
            return
        cotangents, operands = _matrix(cotangent), _matrix(cast(operand, cotangent))
        known = tape.gradients.sums.get(id(self.weight))
        if known is not None and known.dtype == cotangents.dtype:
            known.addmm_(cotangents.t(), operands)
        else:
            tape.gradients.add(self.weight, torch.mm(cotangents.t(), operands))

    def add_bias_gradient(self, tape: Tape, cotangent: Tensor) -> None:
        if self.bias is not None and self.bias.requires_grad:
            tape.gradients.add(self.bias, _matrix(cotangent).sum(0))


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(0, -2)


def record_linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or input.dim() < 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise NoRule("a linear layer of unusual shape")
    weight_, bias_ = tape.weight(weight, "weight"), tape.weight(bias, "bias")
    output = linear(input, weight, bias)
    return tape.add(Linear(tape.keep(input), weight, bias), (input,), output, weight_, bias_)


RULES = {linear: record_linear}
