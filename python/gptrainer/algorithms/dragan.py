"""DRAGAN: a gradient penalty around the data."""

from __future__ import annotations

import gpkernels
from gptrainer.algorithms.system import Setup, System, adam
from gptrainer.config import filled


def dragan(setup: Setup) -> System:
    """Kodali et al. 2017, Algorithm 1, with the non-saturating loss of their code."""
    loss = gpkernels.CriticLoss(
        setup.critic,
        objective="gan",
        penalty="dragan",
        penalty_weight=filled(setup.config.penalty_weight),
        dragan_scale=filled(setup.config.scale),
        together=setup.together,
    )
    return System(setup, loss, gpkernels.nonsaturating_generator_loss, adam(setup), ("penalty",))
