"""Dropout: a mask drawn as PyTorch draws it, then kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.critic.structure import scaled
from gpkernels.critic.tape import Tape


def _dropout(by_channel: bool) -> Callable[..., Tensor]:
    def record(tape: Tape, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if by_channel else input.shape
        like = input.new_empty(shape) if by_channel else torch.empty_like(input)
        mask = like.bernoulli_(1 - p).div_(1 - p) if p < 1 else like.zero_()
        return scaled(tape, input, mask, inplace)

    return record


RULES: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _dropout(False),
    **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d), _dropout(True)),
}
