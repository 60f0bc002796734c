"""Peak memory of penalties and steps beside plain PyTorch's, counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gpkernels as gpk
from critics import SkipField, mlp, plain_loss, plain_penalty
from gpkernels.bench.counts import peak

CPU = torch.device("cpu")


def held(call: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the most bytes held by a loss and its backward, from the third call on."""

    def step() -> None:
        model.zero_grad()
        call().backward()

    for _ in range(3):
        step()
    return peak(step, CPU)


def test_an_eikonal_loss_holds_less_than_autograd(loop: str) -> None:
    field, x = SkipField(32, 8, 100.0), torch.randn(512, 3)
    ours = held(lambda: gpk.eikonal_loss(field, x), field)
    plain = held(lambda: plain_penalty(field, x), field)
    assert ours <= 0.9 * plain


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Softplus, nn.SiLU])
def test_a_step_group_by_group_holds_less_than_autograd(activation: Callable[[], nn.Module], loop: str) -> None:
    critic = mlp(8, *[32] * 4, 1, activation=activation)
    real, fake = torch.randn(512, 8), torch.randn(512, 8)
    criterion = gpk.CriticLoss(critic, together=False)
    ours = held(lambda: criterion(real, fake).loss, critic)
    plain = held(lambda: plain_loss(critic, real, fake, torch.rand(512, 1)), critic)
    assert ours <= 0.75 * plain


class Mark:
    """An object whose end can be seen."""


class Marked(nn.Module):
    """A critic whose graph calls ``torch.special.erfcx`` when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.first(x))
        mark = Mark()
        assert h.grad_fn is not None
        h.grad_fn.metadata["mark"] = mark
        weakref.finalize(mark, torch.special.erfcx, torch.zeros(1))
        return self.second(h)


@pytest.mark.parametrize("how", ["penalty", "together", "apart"])
def test_the_forward_passs_graph_is_freed_before_the_gradient_is_computed(how: str, loop: str) -> None:
    critic = Marked()
    real, fake = torch.randn(5, 4), torch.randn(5, 4)
    criterion = gpk.CriticLoss(critic, together=how == "together")
    calls: dict[str, Callable[[], Any]] = {"penalty": lambda: gpk.gradient_penalty(critic, real, fake)}
    call = calls.get(how, lambda: criterion(real, fake).loss)
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    names = [event.name for event in sorted(seen.events(), key=lambda event: event.time_range.start)]
    names = [name for name in names if name in ("aten::special_erfcx", "gpkernels::gradient_norm_penalty")]
    graphs = 3 if how == "apart" else 1
    assert names == ["aten::special_erfcx"] * graphs + ["gpkernels::gradient_norm_penalty"]
