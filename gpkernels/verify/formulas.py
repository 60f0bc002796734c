"""Formulas of penalties on an input gradient in public code, correct and wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FLATTEN = "flatten first: grad.flatten(1).norm(2, dim=1)"
TWO_SIDED, ONE_SIDED, ZERO_CENTRED = "two-sided", "one-sided", "zero-centred"


@dataclass(frozen=True)
class Formula:
    """Penalty on a gradient, (N, *). text: the mistake and its remedy; "" for formulas of papers."""

    name: str
    of: Callable[[Tensor], Tensor]
    text: str = ""


def formulas(axes: int) -> Iterator[Formula]:
    """Yield the formulas for a gradient with so many axes: the correct ones first, then the others by likelihood."""
    yield Formula(TWO_SIDED, lambda g: (_norms(g) - 1).square().mean())
    yield Formula(ONE_SIDED, lambda g: (_norms(g) - 1).clamp(min=0).square().mean())
    yield Formula(ZERO_CENTRED, lambda g: _norms(g).square().mean())
    if axes > 2:
        yield Formula(
            "norm over channels",
            lambda g: (g.norm(2, dim=1) - 1).square().mean(),
            f"the norm is over the channels alone (dim=1 of {axes} axes), so each pixel has a norm of its own, "
            f"driven to 1; {FLATTEN}",
        )
        for axis in range(2, axes):
            yield Formula(
                f"norm over axis {axis}",
                lambda g, axis=axis: (g.norm(2, dim=axis) - 1).square().mean(),  # type: ignore[misc]
                f"the norm is over axis {axis} alone, not over all of a sample; {FLATTEN}",
            )
    yield Formula(
        "norm per element",
        lambda g: (g.abs() - 1).square().mean(),
        f"there is no norm: each element of the gradient is driven to 1; {FLATTEN}",
    )
    yield Formula(
        "norm over the batch",
        lambda g: (g.norm() - 1).square(),
        f"there is one norm for the whole batch, so the norm of each sample is not driven to 1; {FLATTEN}",
    )
    yield Formula(
        "norm along the batch",
        lambda g: (g.norm(2, dim=0) - 1).square().mean(),
        f"the norm is along the batch (dim=0), not of each sample; {FLATTEN}",
    )
    yield Formula(
        "mean in the norm",
        lambda g: (g.flatten(1).square().mean(1).sqrt() - 1).square().mean(),
        "the norm uses the mean of squares instead of their sum: it is too small by the square root of a sample's size",
    )
    yield Formula(
        "absolute values in the norm",
        lambda g: (g.flatten(1).abs().sum(1) - 1).square().mean(),
        "the norm is the sum of absolute values; use the 2-norm: .norm(2, dim=1)",
    )
    yield Formula(
        "missing square",
        lambda g: (_norms(g) - 1).mean(),
        "the square is missing: norms below 1 make the penalty negative; write ((norm - 1) ** 2).mean()",
    )
    yield Formula(
        "absolute value for the square",
        lambda g: (_norms(g) - 1).abs().mean(),
        "there is an absolute value instead of the square; write ((norm - 1) ** 2).mean()",
    )
    yield Formula(
        "missing root",
        lambda g: (_norms(g).square() - 1).square().mean(),
        "the root is missing: 1 is subtracted from the square of the norm; take .sqrt() of the sum of squares first",
    )
    yield Formula(
        "mean before the square",
        lambda g: (_norms(g).mean() - 1).square(),
        "the mean is taken before 1 is subtracted: only the mean norm is driven to 1, not each sample's; write "
        "((norm - 1) ** 2).mean()",
    )
    for name, of in ((TWO_SIDED, (lambda n: (n - 1).square())), (ZERO_CENTRED, torch.square)):
        yield Formula(
            f"{name}, summed",
            lambda g, of=of: of(_norms(g)).sum(),  # type: ignore[misc]
            "it is summed over the batch, so its weight grows with the batch size; take the mean",
        )


def _norms(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).norm(2, dim=1)
