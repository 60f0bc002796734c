"""LSTMs that oneDNN makes in one call, against PyTorch in float64, where they are made of small ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import gradients
from gpkernels.critic.by_autograd import left_to_autograd
from gpkernels.critic.graph import Graph
from gpkernels.critic.rules import RULES
from gpkernels.zoo import plain_loss

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
NODE = "MkldnnRnnLayerBackward0"


class Critic(nn.Module):
    """reads: what of the layer's outputs the scores come of."""

    def __init__(self, reads: str, **options: Any) -> None:
        super().__init__()
        self.reads = reads
        self.layer = nn.LSTM(3, 8, batch_first=True, **options)
        self.out = nn.Linear(16 if options.get("bidirectional") else 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.layer(x)
        if self.reads == "states":
            return self.out(h[-1] * c[-1].sin()) + self.out(y.mean(1))
        return self.out(y[:, -1]) if self.reads == "the last step" else self.out(y.tanh()).mean(1)


def batches(n: int = 4, steps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, steps, 3), torch.randn(n, steps, 3), torch.rand(n, 1, 1)


CRITICS: list[tuple[str, dict[str, Any]]] = [
    ("the last step", {}),
    ("all steps", {}),
    ("states", {}),
    ("all steps", {"bias": False}),
    ("the last step", {"num_layers": 2}),
    ("all steps", {"bidirectional": True}),
    ("all steps", {"num_layers": 2, "bidirectional": True}),
]


def check(critic: nn.Module, steps: int = 5) -> None:
    """A step's gradients, in its first calls and by its program, are about as near as PyTorch's own."""
    real, fake, eps = batches(steps=steps)
    wide = copy.deepcopy(critic).double()
    exact = gradients(plain_loss(wide, real.double(), fake.double(), eps.double()), wide)
    eager = gradients(plain_loss(critic, real, fake, eps), critic)
    loss = gpk.CriticLoss(critic)
    for _ in range(4):
        found = gradients(loss(real, fake, eps=eps).loss, critic)
        for a, b, c in zip(found, exact, eager, strict=True):
            assert (a - b).norm() <= 4 * (c - b).norm() + 5e-7 * b.norm()


@pytest.mark.parametrize(("reads", "options"), CRITICS, ids=[f"{reads}, {options}" for reads, options in CRITICS])
def test_a_step_is_exact(reads: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    critic = Critic(reads, **options)
    check(critic)
    nodes = {node.name() for node, _ in Graph([critic(torch.randn(2, 5, 3))]).nodes}
    assert NODE in nodes
    assert NODE in RULES
    assert not left_to_autograd.has(critic, torch.zeros(4, 5, 3))


@pytest.mark.parametrize("weights", [True, False])
def test_it_is_the_same_in_python(weights: bool) -> None:
    torch.manual_seed(0)
    critic = Critic("states").requires_grad_(weights)
    critic.out.requires_grad_()
    with gpk.backend("reference"):
        check(critic)


def test_one_step_is_enough() -> None:
    torch.manual_seed(0)
    check(Critic("the last step"), steps=1)


def test_frozen_weights_have_no_gradient() -> None:
    torch.manual_seed(0)
    critic = Critic("all steps")
    critic.layer.weight_hh_l0.requires_grad_(False)
    check(critic)


class WithStates(nn.Module):
    """Its states at first are trained, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 1)
        self.states = nn.ParameterList([nn.Parameter(torch.randn(1, 1, 8)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h, c = (u.expand(1, len(x), 8).contiguous() for u in self.states)
        return self.out(self.layer(x, (h, c))[0][:, -1])


class GivenStates(WithStates):
    """Its states at first are other than zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.states.requires_grad_(False)


@pytest.mark.parametrize("kind", [WithStates, GivenStates])
def test_states_at_first(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    check(kind())
