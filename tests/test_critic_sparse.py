"""Critics with sparse tensors (adjacencies, weights, activations and gradients), and with nested ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import batch
from critics import plain_loss, plain_penalty, plain_points
from gpkernels import backends

N = 5  # nodes of a graph, which are the samples
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])


def adjacency(values: Tensor | None = None) -> Tensor:
    values = torch.ones(EDGES.shape[1], dtype=torch.float64) if values is None else values
    return torch.sparse_coo_tensor(EDGES, values, (N, N), check_invariants=False)


def along_edges(h: Tensor) -> Tensor:
    """The product of the features at both ends of each edge."""
    return adjacency((h[EDGES[0]] * h[EDGES[1]]).sum(1))


class OnGraph(nn.Module):
    """A layer at each node, and a function of all nodes and of weights."""

    def __init__(self, function: Callable[..., Tensor], weights: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.top, self.function, self.weights = nn.Linear(4, N), nn.Linear(N, 1), function, weights

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.top(self.function(h) if self.weights is None else self.function(h, self.weights))


class Edges(nn.Module):
    """Weights of edges, dense or as a sparse matrix."""

    def __init__(self, as_matrix: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        values = torch.rand(EDGES.shape[1], dtype=torch.float64)
        self.own = nn.Parameter(values if as_matrix is None else as_matrix(adjacency(values)))


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "torch.sparse.mm": lambda: OnGraph(lambda h: torch.sparse.mm(adjacency(), h)),
    "a product with a sparse matrix": lambda: OnGraph(lambda h: adjacency().coalesce() @ h),
    "a product with a matrix in rows": lambda: OnGraph(lambda h: adjacency().to_sparse_csr() @ h),
    "a product with a sparse matrix for each sample": lambda: OnGraph(
        lambda h: torch.bmm(torch.eye(N, dtype=h.dtype)[None].to_sparse(), h[None])[0]
    ),
    "weights of edges": lambda: OnGraph(lambda h, w: torch.sparse.mm(adjacency(w.own), h), Edges()),
    "a sparse matrix of features": lambda: OnGraph(lambda h: torch.sparse.mm(along_edges(h), h)),
    "a sparse matrix of features made dense": lambda: OnGraph(lambda h: along_edges(h).to_dense() + h),
    "sums of a sparse matrix": lambda: OnGraph(lambda h: h + torch.sparse.sum(along_edges(h), 1).to_dense()[:, None]),
    "a sparse weight": lambda: OnGraph(lambda h, w: torch.sparse.mm(w.own, h), Edges(Tensor.coalesce)),
    "a sparse weight in rows": lambda: OnGraph(lambda h, w: w.own @ h, Edges(Tensor.to_sparse_csr)),
    "a sparse embedding": lambda: OnGraph(
        lambda h, w: h * w(torch.tensor([0, 1, 1, 3, 0])), nn.Embedding(6, N, sparse=True)
    ),
}


def gradients_are_pytorchs(ours: Tensor, exact: Tensor, critic: nn.Module) -> None:
    """The same value, and gradients of one layout that are the same."""
    leaves = list(critic.parameters())
    found, wanted = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (ours, exact))
    torch.testing.assert_close(ours, exact)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.layout == b.layout
            torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loop", ["C++", "Python"])
@pytest.mark.parametrize("name", CRITICS)
def test_losses_and_gradients_are_pytorchs(name: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loop == "Python":
        monkeypatch.setattr(backends, "program", None)
    critic = CRITICS[name]().double()
    loss, r1 = gpk.CriticLoss(critic), gpk.CriticLoss(critic, objective="gan", penalty="r1")
    for _ in range(4):
        real, fake, eps = batch(N, 4)
        points = plain_points(real, fake, eps, "wgan-gp")
        gradients_are_pytorchs(gpk.gradient_penalty(critic, real, fake, eps=eps), plain_penalty(critic, points), critic)
        gradients_are_pytorchs(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)
        gradients_are_pytorchs(r1(real, fake).loss, plain_loss(critic, real, fake, eps, "gan", "r1"), critic)
        value, gradient = gpk.value_and_input_gradient(critic, real)
        x = real.clone().requires_grad_()
        exact = critic(x)
        (wanted,) = torch.autograd.grad(exact.sum(), x, create_graph=True)
        gradients_are_pytorchs((value * 2).sum() + gradient.sin().sum(), (exact * 2).sum() + wanted.sin().sum(), critic)


def test_the_loss_may_be_scaled() -> None:
    critic = CRITICS["a sparse embedding"]().double()
    real, fake, eps = batch(N, 4)
    loss = gpk.CriticLoss(critic)(real, fake, eps=eps).loss
    gradients_are_pytorchs(3 * loss, 3 * plain_loss(critic, real, fake, eps), critic)


def nested(h: Tensor) -> Tensor:
    """Activations by way of a nested tensor, which has no sizes."""
    return torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([h[:2], h[2:]]), 0.0).flatten(0, 1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_gradients_through_nested_tensors_are_pytorchs() -> None:
    critic = OnGraph(nested).double()
    for _ in range(3):
        x, _, _ = batch(N, 4)
        value, gradient = gpk.value_and_input_gradient(critic, x)
        x.requires_grad_()
        exact = critic(x)
        (wanted,) = torch.autograd.grad(exact.sum(), x, create_graph=True)
        gradients_are_pytorchs(value.sum() + gradient.sin().sum(), exact.sum() + wanted.sin().sum(), critic)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("with_loss", [False, True])
def test_penalties_of_nested_tensors_are_an_error_by_name(with_loss: bool) -> None:
    critic = OnGraph(nested).double()
    real, fake, _ = batch(N, 4)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="critic: a penalty of nested tensors is not supported; pad them"):
            gpk.CriticLoss(critic)(real, fake) if with_loss else gpk.r1_penalty(critic, real)
