"""Randomly composed critics: value and all gradients are plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gpkernels as gpk
from comparing import PENALTIES, assert_exactly_as, batch
from critics import plain_loss, plain_penalty, plain_points

WIDTH = 6


class Bent(torch.autograd.Function):
    """Its backward is not its forward's derivative, and has one of its own for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.relu(x) * w

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return cotangent * w * x.sigmoid(), (cotangent * x.sin()).sum(0)


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        return x * y, x - y

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return first * y + second, first * x - second


def _written(a: Tensor, b: Tensor) -> Tensor:
    out = a.sin()
    out[:, :3] = b[:, 3:]
    out[:, 4].mul_(2)
    return out


def _into_zeros(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros_like(a)
    out[:, 1:4] += a[:, 1:4]
    out[:, 5] = b[:, 0]
    return out


def _kept(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(b)
    return a * scale


TABLE = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)

# Of two activations (N, 6), a trained vector (6,) and a trained matrix (6, 6).
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    # element by element
    "tanh": lambda a, b, w, m: torch.tanh(a),
    "sin": lambda a, b, w, m: a.sin(),
    "relu": lambda a, b, w, m: torch.relu(a),
    "leaky": lambda a, b, w, m: F.leaky_relu(a, 0.2),
    "gelu": lambda a, b, w, m: F.gelu(a),
    "softplus": lambda a, b, w, m: F.softplus(a, beta=3),
    "bell": lambda a, b, w, m: torch.exp(-a * a),
    "clamp": lambda a, b, w, m: a.clamp(-0.5, 0.7),
    "affine": lambda a, b, w, m: 1 - 2 * a / 3,
    "square root": lambda a, b, w, m: (a * a + 1).sqrt(),
    # two activations
    "add": lambda a, b, w, m: torch.add(a, b, alpha=-0.5),
    "multiply": lambda a, b, w, m: a * torch.tanh(b),
    "divide": lambda a, b, w, m: a / (1 + b * b),
    "maximum": lambda a, b, w, m: torch.maximum(a, b + 0.1),
    "where": lambda a, b, w, m: torch.where(b > 0.2, a, b),
    "lerp": lambda a, b, w, m: torch.lerp(a, b, 0.3),
    "angle": lambda a, b, w, m: torch.atan2(a, b * b + 1),
    "join": lambda a, b, w, m: torch.cat([a, b], 1) @ torch.cat([m, m.t()]) / 3,
    "stack": lambda a, b, w, m: torch.stack([a, b.sin()], 1).mean(1),
    "add and multiply": lambda a, b, w, m: torch.addcmul(w, a, torch.sigmoid(b), value=0.5),
    # trained and computed operands
    "scale": lambda a, b, w, m: a * w,
    "shift": lambda a, b, w, m: w - a,
    "over a weight": lambda a, b, w, m: a / (1 + w * w),
    "linear": lambda a, b, w, m: F.linear(a, m, w),
    "product": lambda a, b, w, m: a @ m,
    "product with a computed matrix": lambda a, b, w, m: a @ torch.softmax(m * m, 1),
    "product with its transpose": lambda a, b, w, m: (a @ m).tanh() @ m.t(),
    "onto": lambda a, b, w, m: torch.addmm(a, b, m, alpha=0.3),
    "by a norm": lambda a, b, w, m: a * w / w.norm(),
    "by a mean": lambda a, b, w, m: a * m.mean(),
    "by a column": lambda a, b, w, m: a + m[:, 2] * torch.tanh(a),
    "normalised weight": lambda a, b, w, m: F.linear(a, torch._weight_norm(m, m.norm(dim=1, keepdim=True) * 0.5, 0)),
    "diagonal": lambda a, b, w, m: a * m.diagonal(),
    # spread
    "outer": lambda a, b, w, m: (a.tanh()[:, :, None] * b.tanh()[:, None]).mean(1),
    "by a number a sample": lambda a, b, w, m: a * torch.tanh(b).mean(1, keepdim=True),
    "with a matrix": lambda a, b, w, m: (a[:, None] + m).sin().mean(2),
    "with a constant": lambda a, b, w, m: a * TABLE,
    "with a constant in front": lambda a, b, w, m: (TABLE[:, None, None] * a).sum(0),
    # out of the graph
    "detached": lambda a, b, w, m: a.detach() * b,
    "masked": lambda a, b, w, m: a * (b > 0),
    "without gradients": lambda a, b, w, m: _kept(a, b),
    # in place
    "in place": lambda a, b, w, m: a.sin().mul_(w).add_(b, alpha=0.5),
    "relu in place": lambda a, b, w, m: F.relu_(a + b),
    "view in place": lambda a, b, w, m: a.sin().view(-1, 3).relu_().view(-1, WIDTH) + b,
    "written": lambda a, b, w, m: _written(a, b),
    "into zeros": lambda a, b, w, m: _into_zeros(a, b),
    "on the spot": lambda a, b, w, m: a.mul_(0.5).add_(w),
    # shapes
    "rows split": lambda a, b, w, m: (a.reshape(-1, 3) @ m[:3, 1:4]).tanh().reshape(len(a), -1),
    "rows joined": lambda a, b, w, m: torch.cat([a, b]).view(2, len(a), -1).mul(0.7).sum(0),
    "rows repeated": lambda a, b, w, m: (a.repeat_interleave(2, 0).view(len(a), 2, -1) * m[:2]).sum(1),
    "columns first": lambda a, b, w, m: (m @ a.t()).t().contiguous(),
    "parts": lambda a, b, w, m: torch.cat([p.sin() for p in b.split([1, 3, 2], 1)][::-1], 1),
    "part": lambda a, b, w, m: a.chunk(2, 1)[1].repeat(1, 2),
    "unbound": lambda a, b, w, m: torch.stack(a.unbind(1)[::-1], 1),
    "picked": lambda a, b, w, m: a[:, [0, 0, 5, 2, 1, 3]],
    "gathered": lambda a, b, w, m: b.gather(1, a.argsort(1)),
    "rolled": lambda a, b, w, m: a.roll(1, 1) - b.flip(1),
    "sorted": lambda a, b, w, m: a.sort(1).values,
    "sums": lambda a, b, w, m: a.cumsum(1).mul(0.3),
    "products": lambda a, b, w, m: (1 + 0.1 * a).cumprod(1),
    "tokens": lambda a, b, w, m: (torch.softmax(a.view(-1, 3, 2) @ b.view(-1, 3, 2).mT, 2) @ a.view(-1, 3, 2)).flatten(
        1
    ),
    "convolution": lambda a, b, w, m: F.conv1d(a.view(-1, 2, 3), m[:2, :4].reshape(2, 2, 2), padding=1)[
        ..., 1:
    ].flatten(1),
    "windows": lambda a, b, w, m: F.max_pool1d(a[:, None], 3, 1, 1)[:, 0],
    # within a sample
    "layer norm": lambda a, b, w, m: F.layer_norm(a, (WIDTH,), w, m[0], 0.1),
    "group norm": lambda a, b, w, m: F.group_norm(a, 2, w, None, 0.1),
    "softmax": lambda a, b, w, m: torch.softmax(a, 1) * b,
    "log of a sum": lambda a, b, w, m: a - torch.logsumexp(a, 1, keepdim=True),
    "norm": lambda a, b, w, m: a / (1 + a.norm(dim=1, keepdim=True)),
    "spread": lambda a, b, w, m: a * b.std(1, keepdim=True),
    "largest": lambda a, b, w, m: a - a.amax(1, keepdim=True),
    # no rule
    "custom": lambda a, b, w, m: Bent.apply(a, w),
    "custom pair": lambda a, b, w, m: Pair.apply(a, b.tanh())[0] + 0.1 * a,
    "custom pair, one half": lambda a, b, w, m: Pair.apply(a, b)[1],
    "checkpointed": lambda a, b, w, m: checkpoint(lambda a: (a @ m).tanh(), a, use_reentrant=False),
    "einsum": lambda a, b, w, m: torch.einsum("ni,nj,ij->nj", a.tanh(), b.tanh(), m) / 3,
    # the batch
    "mean of the batch": lambda a, b, w, m: a - a.mean(0),
    "spread of the batch": lambda a, b, w, m: a / (0.5 + a.std(0)),
    "batch norm": lambda a, b, w, m: F.batch_norm(a, None, None, w, m[1], True, eps=0.1),
    "another order": lambda a, b, w, m: a + b.flip(0),
    "each with each": lambda a, b, w, m: torch.tanh(a @ b.t()) @ b / 4,
    "a mean out of the graph": lambda a, b, w, m: a - b.detach().mean(0),
    "the number of samples": lambda a, b, w, m: a * len(a) / 3,
    "a row for each": lambda a, b, w, m: a * torch.linspace(0, 1, len(a), dtype=a.dtype)[:, None],
    "the largest of all": lambda a, b, w, m: a / (1 + b.detach().abs().max().item()),
    "one by one": lambda a, b, w, m: torch.stack([row * w for row in a]),
    "a number for the samples": lambda a, b, w, m: a * torch.tensor([1 / len(a)], dtype=a.dtype),
    "filled with their number": lambda a, b, w, m: a + torch.full((WIDTH,), 1 / len(a), dtype=a.dtype),
    "the last of them": lambda a, b, w, m: a - torch.tanh(b)[len(a) - 1],
    "ones counted": lambda a, b, w, m: a / a.new_ones(len(a)).sum(),
    # strides
    "expanded": lambda a, b, w, m: a[:, 2:3].expand(-1, WIDTH).tanh() * b,
    "permuted": lambda a, b, w, m: (a.view(-1, 2, 3).transpose(1, 2) @ m[:2, :2]).flatten(1),
    "a mean permuted": lambda a, b, w, m: a.view(-1, 2, 3).permute(2, 0, 1).mean(0).sin().repeat(1, 3),
    "every other": lambda a, b, w, m: torch.cat([a[:, ::2], b[:, 1::2].cos()], 1),
    "overlapping windows": lambda a, b, w, m: a.unfold(1, 4, 1).sin().sum(1).repeat(1, 2)[:, :WIDTH],
    "columns copied": lambda a, b, w, m: F.linear(a.t().contiguous().t(), m.t()),
}
# Batches in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "columns first": lambda x: x.t().contiguous().t(),
    "part of more": lambda x: torch.cat([x, x], 1)[:, :WIDTH],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one sample, repeated": lambda x: x[:1].expand(len(x), -1),
}


class Random(nn.Module):
    """steps: (a call, the places of its two activations among all so far, which weights)."""

    def __init__(self, steps: list[tuple[str, int, int, int]], frozen: bool) -> None:
        super().__init__()
        self.first, self.top = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.steps = steps
        self.vectors = nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in range(2)])
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH) / 2) for _ in range(2)])
        self.vectors[1].requires_grad_(not frozen)
        self.first.weight.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.first(x), torch.sin(x)]
        for name, i, j, k in self.steps:
            a, b = (values[-1 - place % len(values)] for place in (i, j))
            values.append(CALLS[name](a, b, self.vectors[k % 2], self.matrices[k // 2]))
        return self.top(torch.tanh(values[-1]) + values[-1])


def plain(
    critic: Random, real: Tensor, fake: Tensor, eps: Tensor, *options: str
) -> tuple[Tensor | None, Tensor | None]:
    """The whole loss and the penalty alone; None where there is nothing to compare with."""
    weights = [p for p in critic.parameters() if p.requires_grad]
    try:
        exact = plain_loss(critic, real, fake, eps, *options)
        alone = plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"), 0.5)
        found = torch.autograd.grad(exact + alone, weights, retain_graph=True, allow_unused=True)
    except (RuntimeError, ValueError):  # something that is overwritten is needed, say
        return None, None
    tame = all(bool(g.isfinite().all()) and float(g.abs().max()) < 1e6 for g in found if g is not None)
    return (exact, alone) if tame else (None, None)  # PyTorch has no number where a spread is 0, say


step = st.tuples(st.sampled_from(sorted(CALLS)), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(
    steps=st.lists(step, min_size=2, max_size=9),
    n=st.integers(1, 5),
    objective=st.sampled_from(["wgan", "gan"]),
    penalty=st.sampled_from(PENALTIES),
    together=st.sampled_from([None, None, False]),
    frozen=st.booleans(),
    inputs=st.booleans(),
    seed=st.integers(0, 1000),
    layout=st.sampled_from(sorted(LAYOUTS)),
    other=st.integers(1, 5),
)
def test_a_random_critic_has_pytorchs_value_and_gradients(
    steps: list[tuple[str, int, int, int]],
    n: int,
    objective: str,
    penalty: str,
    together: bool | None,
    frozen: bool,
    inputs: bool,
    seed: int,
    layout: str,
    other: int,
) -> None:
    torch.manual_seed(seed)
    critic = Random(steps, frozen).double()
    loss = gpk.CriticLoss(critic, objective=objective, penalty=penalty, together=together)
    for size in (n, n, n, other, n, other):
        real, fake, eps = batch(size, WIDTH)
        real = LAYOUTS[layout](real).requires_grad_(inputs)
        exact, alone = plain(critic, real, fake, eps, objective, penalty)
        assume(exact is not None)
        ours = loss(real, fake, eps=eps).loss
        own = [real] if inputs else []
        assert_exactly_as(ours, exact, critic, 1e-8, own)
        ours = gpk.gradient_penalty(critic, real.detach(), fake, eps=eps, target=0.5)
        assert_exactly_as(ours, alone, critic, 1e-8)
