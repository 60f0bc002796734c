"""Rules of a critic's calls, by the names of autograd's nodes. Calls without a rule are left to autograd."""

from __future__ import annotations

from gpkernels.critic.rules import (
    attention,
    images,
    moments,
    normalisation,
    pairs,
    piecewise,
    products,
    recurrent,
    reductions,
    shapes,
    smooth,
    softmax,
)
from gpkernels.critic.rules.base import Rule

RULES: dict[str, type[Rule]] = {
    name: rule
    for family in (
        *(piecewise, smooth, pairs, products, shapes, reductions, images, normalisation, moments, softmax, recurrent),
        attention,
    )
    for rule in family.RULES
    for name in rule.names
}
