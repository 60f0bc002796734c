"""A critic that goes by rules or is left to autograd, and what the package runs in Python for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import gpkernels as gpk

PACKAGE = Path(gpk.__file__).parent
N, WIDTH = 4, 5


class Cubed(torch.autograd.Function):
    """As that of ``gpkernels.bench``, but not in the package, whose functions are counted here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * cotangents[0] * x**2


class Scored(nn.Module):
    """Scores and features of samples, shifted by what the caller gives; dropout in training.

    cubes: whether there is a call without a rule, for which the whole is left to autograd.
    """

    cubes: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.Softplus(), nn.Dropout(0.5))
        self.top = nn.Linear(8, 1)

    def forward(self, x: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        features = self.body(x) + shift
        if self.cubes:
            features = Cubed.apply(features)
        return self.top(features).square(), features


def functions_called(call: Callable[[], object]) -> list[str]:
    """Name the package's functions in Python that a call makes."""
    found: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            found.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
