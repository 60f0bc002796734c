"""Suite of input gradients as values: alone, of frozen models, and in a loss with its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import gpkernels as gpk
from gpkernels.bench.cases import CASES, Case
from gpkernels.bench.clock import Call
from gpkernels.bench.counts import bare_products
from gpkernels.bench.small import SMALL
from gpkernels.bench.trial import EAGER, OURS, Trial
from gpkernels.zoo import mlp

SUITE = "gradients"
FIELDS: dict[str, Case] = {
    "linear, N 2": Case(lambda: nn.Linear(3, 1), (2, 3)),
    "softplus 3-64x2-1, N 2": Case(lambda: mlp(3, 64, 64, 1, activation=lambda: nn.Softplus(100)), (2, 3)),
    "LayerNorm 3-64x2-1, N 2": Case(lambda: mlp(3, 64, 64, 1, norm=True), (2, 3)),
}
OF_STEPS = (
    *(
        "tanh, N 2",
        "ReLU, N 2",
        "sine, N 64",
        "SDF 3-32x8 with skips, N 64",
        "DCGAN, N 2",
        "attention, N 4",
        "GRU, N 4",
    ),
    *("custom function, N 2", "cumulated product, N 16"),
)
QUICK = ("tanh, N 2",)
LARGE = "SDF 3-256x8-1 softplus, N 4096"
Way = Callable[[nn.Module, Tensor, bool], tuple[Tensor, Tensor]]  # (model, x, whether results have a graph)


def trials(device: torch.device, quick: bool) -> Iterator[Trial]:
    """Yield every model, small ones first: what a simulation, an inference and a training step ask for."""
    cases = {**FIELDS, **{name: SMALL[name] for name in OF_STEPS}, LARGE: CASES[LARGE]}
    for name, case in cases.items():
        if not quick or name in QUICK:
            yield from _of(name, case, device)


def growth(device: torch.device) -> Iterator[Trial]:
    """Yield a loss of the gradient over the batch."""
    for n in (2, 64, 1024, 4096):
        case = Case(FIELDS["softplus 3-64x2-1, N 2"].make, (n, 3))
        yield _training("softplus 3-64x2-1: batch", case, device, axis="softplus 3-64x2-1: batch", size=n)


def _of(name: str, case: Case, device: torch.device) -> Iterator[Trial]:
    x = _points(case, device)
    model, frozen = (case.make().to(device) for _ in range(2))
    frozen.requires_grad_(False).eval()
    yield _trial(f"{name}, with a graph", lambda way: way(model, x, True))
    yield _trial(f"{name}, frozen", lambda way: way(frozen, x, False))
    yield _trial(f"{name}, in no_grad", lambda way: _without_graph(way, model, x))
    yield _training(f"{name}, loss", case, device)


def _points(case: Case, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(case.shape, device=device)


def _training(name: str, case: Case, device: torch.device, **place: Any) -> Trial:
    """Return a loss of value and gradient with its weight gradients."""
    x = _points(case, device)
    model = case.make().to(device)
    weights = list(model.parameters())

    def step(way: Way) -> Any:
        value, gradient = way(model, x, True)
        loss = (gradient.flatten(1).norm(dim=1) - 1).square().mean() + value.abs().mean()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    return _trial(name, step, **place)


def _without_graph(way: Way, model: nn.Module, x: Tensor) -> Any:
    if way is _eager:
        return way(model, x, False)
    with torch.no_grad():
        return way(model, x, False)


def _trial(name: str, run: Callable[[Way], Any], **place: Any) -> Trial:
    calls: dict[str, Callable[[], Call]] = {OURS: lambda: lambda: run(_ours), EAGER: lambda: lambda: run(_eager)}
    return Trial(SUITE, name, calls, lambda: bare_products(lambda: run(_ours)), **place)


def _ours(model: nn.Module, x: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = gpk.value_and_input_gradient(model, x)
    return found


def _eager(model: nn.Module, x: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = model(x)
    (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=graph)
    return value, gradient
