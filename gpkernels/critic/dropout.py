"""Dropout: a mask drawn as PyTorch draws it, then kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.critic.structure import scaled
from gpkernels.critic.tape import NoRule, Tape


def _dropout(dims: int | None) -> Callable[..., Tensor]:
    """A recorder; ``dims`` axes of a channel are dropped together, None for elements."""
    by_channel = dims is not None

    def record(tape: Tape, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if dims is not None and input.dim() != dims + 2:
            raise NoRule("channel dropout without a batch axis")
        if not training or p == 0:
            return input
        shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if by_channel else input.shape
        like = input.new_empty(shape) if by_channel else torch.empty_like(input)
        mask = like.bernoulli_(1 - p).div_(1 - p) if p < 1 else like.zero_()
        return scaled(tape, input, mask, inplace)

    return record


RULES: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _dropout(None),
    F.dropout1d: _dropout(1),
    F.dropout2d: _dropout(2),
    F.dropout3d: _dropout(3),
}
