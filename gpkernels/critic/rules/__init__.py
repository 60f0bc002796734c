"""The rules of a critic's calls, by the names of autograd's nodes. A call without one is left to autograd alone."""

from __future__ import annotations

from gpkernels.critic.rules import (
    images,
    normalisation,
    pairs,
    piecewise,
    products,
    recurrent,
    reductions,
    shapes,
    smooth,
)
from gpkernels.critic.rules.base import Rule

RULES: dict[str, type[Rule]] = {
    name: rule
    for family in (piecewise, smooth, pairs, products, shapes, reductions, images, normalisation, recurrent)
    for rule in family.RULES
    for name in rule.names
}
