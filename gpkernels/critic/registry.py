"""Every function that has a rule. A new layer is a new file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpkernels.critic import activation, convolution, dropout, linear, normalisation, pooling, structure

RULES: dict[Any, Callable[..., Tensor]] = {
    **linear.RULES,
    **convolution.RULES,
    **activation.RULES,
    **pooling.RULES,
    **normalisation.RULES,
    **dropout.RULES,
    **structure.RULES,
}
