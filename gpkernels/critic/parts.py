"""The parts of a critic's loss: what is asked for, and what is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Adversarial(NamedTuple):
    """The score losses of real and fake rows, by ``reference.SCORE_LOSSES``, and whether both are linear."""

    real: int
    fake: int
    linear: bool


class Consistency(NamedTuple):
    """CT-GAN's term between two passes over the real batch."""

    weight: float
    margin: float
    feature_weight: float


class Penalty(NamedTuple):
    """The penalty on the gradient at the points: weight * mean (|g| - target)^2."""

    weight: float
    target: float
    one_sided: bool


class Parts(NamedTuple):
    loss: Tensor
    adversarial: Tensor
    penalty: Tensor
    consistency: Tensor
