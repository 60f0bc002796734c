"""The rules of a critic's calls, by the names of autograd's nodes. A call without one is left to autograd alone."""

from __future__ import annotations

from gpkernels.critic.rules import elementwise, normalisation, products, shapes
from gpkernels.critic.rules.base import Rule

RULES: dict[str, type[Rule]] = {
    name: rule
    for family in (elementwise, products, shapes, normalisation)
    for rule in family.RULES
    for name in rule.names
}
