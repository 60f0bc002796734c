"""Critics of the usual kinds, and the usual penalties of them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# --- critics ----------------------------------------------------------------------------------------------------------


class Conditional(nn.Module):
    """Scores x given a class, passed by position, and a temperature, passed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(4, 3)
        self.body = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor, label: Tensor, temperature: float = 1.0) -> Tensor:
        return self.body(torch.cat([x, self.label(label)], 1)) / temperature


class TwoInputs(nn.Module):
    """An image beside a vector; the penalty sees the image only."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(2, 4, 3, stride=2), nn.Linear(5, 4)
        self.head = nn.Bilinear(4, 4, 1)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.head(nn.functional.leaky_relu(self.image(x), 0.2).mean((2, 3)), self.vector(vector).tanh())


class WithFeatures(nn.Module):
    """(score, features), as CT-GAN's critic; dropout between them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Dropout(dropout))
        self.score = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.score(features), features


class PlainFunction:
    """A callable with weights of its own that is not a module."""

    def __init__(self) -> None:
        self.weights = [nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7))]

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x @ self.weights[0]) @ self.weights[1]

    def parameters(self) -> list[nn.Parameter]:
        return self.weights

    def double(self) -> PlainFunction:
        self.weights = [nn.Parameter(w.detach().double()) for w in self.weights]
        return self


def mlp(*tail: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 1), *tail)


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 6, 3, 2, 1), nn.LeakyReLU(0.2))


VECTOR, IMAGE, N = (6,), (2, 8, 8), 5
LABELS, VECTORS = torch.tensor([0, 3, 1, 1, 2]), torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)
# name: how to make the critic, the shape of a sample, further positional and named inputs
CRITICS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "an MLP with scores (N, 1)": (mlp, VECTOR, (), {}),
    "an MLP with scores (N,)": (lambda: mlp(nn.Flatten(0)), VECTOR, (), {}),
    "a convolutional critic": (lambda: nn.Sequential(conv(), nn.Flatten(), nn.Linear(24, 1)), IMAGE, (), {}),
    "a critic with a score map": (lambda: nn.Sequential(conv(), nn.Conv2d(6, 1, 1)), IMAGE, (), {}),
    "a critic with LayerNorm": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 1)),
        VECTOR,
        (),
        {},
    ),
    "a conditional critic": (Conditional, VECTOR, (LABELS,), {"temperature": 0.5}),
    "a critic of two inputs": (TwoInputs, IMAGE, (VECTORS,), {}),
    "a critic with features": (WithFeatures, VECTOR, (), {}),
    "a plain function": (PlainFunction, VECTOR, (), {}),
}
SIMPLE = [name for name, (_, _, args, _) in CRITICS.items() if not args]


def make(name: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The critic in float64, a real and a fake batch, and eps."""
    build, shape, _, _ = CRITICS[name]
    critic = build().double()
    real, fake = (torch.randn(N, *shape, dtype=torch.float64) for _ in range(2))
    return critic, real, 2 * fake + 0.5, torch.rand(N, dtype=torch.float64)


# --- the idioms -------------------------------------------------------------------------------------------------------


def scores_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def input_gradient(critic: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    x = x.detach().clone().requires_grad_(True)
    scores = scores_of(critic(x, *args, **kwargs))
    ones = torch.ones_like(scores)
    (gradients,) = torch.autograd.grad(scores, x, grad_outputs=ones, create_graph=True, retain_graph=True)
    return gradients.reshape(x.shape[0], -1)


def plain_gradient_penalty(
    critic: Any,
    real: Tensor,
    fake: Tensor,
    eps: Tensor,
    *args: Any,
    target: float = 1.0,
    one_sided: bool = False,
    **kw: Any,
) -> Tensor:
    alpha = eps.reshape(-1, *[1] * (real.dim() - 1))
    gradients = input_gradient(critic, alpha * real + (1 - alpha) * fake, *args, **kw)
    gap = gradients.norm(2, dim=1) - target
    return ((gap.clamp(min=0) if one_sided else gap) ** 2).mean()


def plain_zero_centred(critic: Any, x: Tensor) -> Tensor:
    return input_gradient(critic, x).square().sum(1).mean()


def gradients_of(value: Tensor, critic: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(critic.parameters()), allow_unused=True))


def assert_equal(ours: Tensor, plain: Tensor, critic: Any) -> None:
    """Equal values and equal gradients; a weight that the penalty does not reach may have none or zeros."""
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    assert ours.requires_grad
    reached = 0
    for a, b in zip(gradients_of(ours, critic), gradients_of(plain, critic), strict=True):
        if b is None or a is None:
            assert all(g is None or not g.any() for g in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            reached += int(b.any())
    assert reached > 0
