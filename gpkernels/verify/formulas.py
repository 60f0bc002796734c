"""What public code makes of an input gradient for a penalty, right and wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FLATTEN = "flatten first: grad.flatten(1).norm(2, dim=1)"
TWO_SIDED, ONE_SIDED, ZERO_CENTRED = "two-sided", "one-sided", "zero-centred"


@dataclass(frozen=True)
class Formula:
    """A penalty of a gradient, (N, *). text: what is wrong with it and what to do; "" for what papers have."""

    name: str
    of: Callable[[Tensor], Tensor]
    text: str = ""


def formulas(axes: int) -> Iterator[Formula]:
    """Those of a gradient with so many axes: first the right ones, then what is likeliest."""
    yield Formula(TWO_SIDED, lambda g: (_norms(g) - 1).square().mean())
    yield Formula(ONE_SIDED, lambda g: (_norms(g) - 1).clamp(min=0).square().mean())
    yield Formula(ZERO_CENTRED, lambda g: _norms(g).square().mean())
    if axes > 2:
        yield Formula(
            "norm over channels",
            lambda g: (g.norm(2, dim=1) - 1).square().mean(),
            f"the norm is over the channels alone (dim=1 of what has {axes} axes), so each pixel has a norm of its "
            f"own, pulled to 1; {FLATTEN}",
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
        f"there is no norm: each element of the gradient is pulled to 1 by itself; {FLATTEN}",
    )
    yield Formula(
        "norm over the batch",
        lambda g: (g.norm() - 1).square(),
        f"there is one norm for the whole batch, so no sample's own slope is 1; {FLATTEN}",
    )
    yield Formula(
        "norm along the batch",
        lambda g: (g.norm(2, dim=0) - 1).square().mean(),
        f"the norm is along the batch (dim=0), not of each sample; {FLATTEN}",
    )
    yield Formula(
        "mean in the norm",
        lambda g: (g.flatten(1).square().mean(1).sqrt() - 1).square().mean(),
        "the norm has a mean of squares in place of their sum: it is too small by the square root of a sample's size",
    )
    yield Formula(
        "absolute values in the norm",
        lambda g: (g.flatten(1).abs().sum(1) - 1).square().mean(),
        "the norm is the sum of absolute values; the 2-norm is meant: .norm(2, dim=1)",
    )
    yield Formula(
        "missing square",
        lambda g: (_norms(g) - 1).mean(),
        "the square is missing: norms below 1 lower the penalty without end; write ((norm - 1) ** 2).mean()",
    )
    yield Formula(
        "absolute value for the square",
        lambda g: (_norms(g) - 1).abs().mean(),
        "the square is missing: there is an absolute value in its place; write ((norm - 1) ** 2).mean()",
    )
    yield Formula(
        "missing root",
        lambda g: (_norms(g).square() - 1).square().mean(),
        "the root is missing: 1 is taken from the square of the norm; take .sqrt() of the sum of squares first",
    )
    yield Formula(
        "mean before the square",
        lambda g: (_norms(g).mean() - 1).square(),
        "the mean is taken before 1 is: only the mean norm is pulled to 1, each sample's is free; write "
        "((norm - 1) ** 2).mean()",
    )
    for name, of in ((TWO_SIDED, (lambda n: (n - 1).square())), (ZERO_CENTRED, torch.square)):
        yield Formula(
            f"{name}, summed",
            lambda g, of=of: of(_norms(g)).sum(),  # type: ignore[misc]
            "it is summed over the batch, so its weight beside the loss grows with the batch; take the mean",
        )


def _norms(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).norm(2, dim=1)
