"""Result of one comparison, and distances between tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Result:
    """Result of one comparison.

    check: kind of check; name: of the op or critic; where: shape and layout, or critic. absolute, relative: largest
    difference from float64, and over its 2-norm; plain: relative error of PyTorch's own operations in the same dtype;
    cosine: of the gradients with float64's. NaN where a check has no such number.
    """

    check: str
    name: str
    backend: str
    dtype: str
    where: str
    ok: bool
    absolute: float = float("nan")
    relative: float = float("nan")
    plain: float = float("nan")
    cosine: float = float("nan")
    note: str = ""


@dataclass(frozen=True)
class Distance:
    """Worst of each number over pairs of tensors."""

    absolute: float
    relative: float
    cosine: float


def distance(got: Sequence[Tensor], exact: Sequence[Tensor]) -> Distance:
    """Compare ``got`` with ``exact``, in float64; the norm of a scalar counts as at least 1, as means may cancel."""
    worst = Distance(0.0, 0.0, 1.0)
    for g, e in zip(got, exact, strict=True):
        a, b = (x.detach().double().cpu().flatten() for x in (g, e))
        if not b.numel():
            continue
        norm = float(b.norm())
        floor = 1.0 if e.dim() == 0 else 1e-300
        cosine = float(torch.dot(a, b) / (a.norm() * b.norm())) if norm > 0 and b.numel() > 1 else 1.0
        worst = Distance(
            max(worst.absolute, float((a - b).abs().max())),
            max(worst.relative, float((a - b).norm()) / max(norm, floor)),
            min(worst.cosine, cosine),
        )
    return worst
