"""What a call depends on besides its arguments: state of this library and of PyTorch, as C++ reads it."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from gpkernels import backends
from gpkernels.critic import compiled
from gpkernels.critic.gathered import SHARDING, may_be_sharded
from gpkernels.private import LEVEL


class Composing(TorchFunctionMode):
    """Function mode in which penalties are composed of PyTorch's operations, and nothing is recorded."""


@cache
def surroundings() -> Any:
    """Return C++'s view of that state; only where ``backends.program`` is loaded."""
    choices = *backends.choice(), compiled.choice()
    return backends.program.Surroundings(*choices, LEVEL, Composing, may_be_sharded, SHARDING, partial, nn.Module)
