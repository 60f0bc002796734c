"""Critics that score one row of many: its selection is made ahead of the calls that compute each row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkernels as gpk
from counting import counted
from gpkernels.critic import picked
from gpkernels.critic.graph import Graph
from gpkernels.critic.plan import Plan
from gpkernels.critic.run import forget
from gpkernels.zoo import VisionTransformer, plain_loss

TOKENS, WIDTH = 5, 8
FEW, MANY = {True: 0, False: 0}, {True: 1 << 60, False: 1 << 60}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small critics do as large ones."""
    forget()
    monkeypatch.setattr(picked, "LEAST_FLOPS", FEW)


class Tokens(nn.Module):
    """Tokens mixed by a product, then a block that computes each alone, then a choice of some."""

    def __init__(self, choose: Callable[[Tensor], Tensor], block: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.mix = nn.Linear(TOKENS, TOKENS)
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH))
        self.block = self.block if block is None else block()
        self.choose, self.top = choose, nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(x.mT).mT
        h = h + self.position + self.block(h.tanh() + self.position)
        return self.top(self.choose(h))


class Encoder(nn.Module):
    """PyTorch's layer, whose last token is scored."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, "gelu", batch_first=batch_first)
        self.batch_first, self.top = batch_first, nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x if self.batch_first else x.transpose(0, 1))
        return self.top(h[:, -1] if self.batch_first else h[-1])


class Attention(nn.Module):
    """Attention whose first, or a later, output is scored."""

    def __init__(self, row: int, **others: Any) -> None:
        super().__init__()
        self.qkv, self.top, self.row, self.others = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 1), row, others

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (u.unflatten(2, (2, -1)).transpose(1, 2) for u in self.qkv(x).chunk(3, 2))
        return self.top(F.scaled_dot_product_attention(q, k, v, **self.others).transpose(1, 2).flatten(2)[:, self.row])


class ByHand(nn.Module):
    """Attention by softmax and products of matrices, whose last output is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.top = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (u.unflatten(2, (2, -1)).transpose(1, 2) for u in self.qkv(x).chunk(3, 2))
        h = ((q @ k.mT) / 2).softmax(-1) @ v
        return self.top(self.out(h.transpose(1, 2).flatten(2))[:, -1])


class MultiHead(nn.Module):
    """PyTorch's module with its weights asked for, as is its default, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.top = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Linear(WIDTH, 1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return self.top((h + self.attention(h, h, h)[0])[:, 0])


def _mask() -> Tensor:
    torch.manual_seed(7)
    return torch.randn(1, 2, TOKENS, TOKENS, dtype=torch.float64)


PICKED = {
    "the first": lambda: Tokens(lambda h: h[:, 0]),
    "the last": lambda: Tokens(lambda h: h[:, -1]),
    "one, with its axis": lambda: Tokens(lambda h: h[:, 2:3].mean(1)),
    "one, by narrow": lambda: Tokens(lambda h: h.narrow(1, 3, 1).squeeze(1)),
    "after a view": lambda: Tokens(lambda h: h.reshape(len(h), TOKENS, 2, -1)[:, 1].flatten(1)),
    "after a transpose": lambda: Tokens(lambda h: h.transpose(0, 1)[1]),
    "the same twice": lambda: Tokens(lambda h: h[:, 1] * h[:, 1].sigmoid()),
    "of a batch of products": lambda: Tokens(lambda h: (h * h.detach().cos()).exp()[:, 4]),
    "behind dropout's evaluation": lambda: Tokens(lambda h: F.dropout(h, 0.5, False).relu()[:, 1]),
    "an encoder's": lambda: Encoder(True),
    "an encoder's, tokens first": lambda: Encoder(False),
    "attention's": lambda: Attention(0),
    "attention's, with a mask": lambda: Attention(2, attn_mask=_mask()),
    "attention's, with a mask of keys": lambda: Attention(1, attn_mask=_mask()[:, :, :1] > 0),
    "attention's by hand": ByHand,
    "a module's with weights": MultiHead,
    "a class token": lambda: VisionTransformer(8, 4, WIDTH, 2, 2),
}
WHOLE = {
    "two": lambda: Tokens(lambda h: h[:, 0] + h[:, 1]),
    "one and the mean": lambda: Tokens(lambda h: h[:, 0] + h.mean(1)),
    "two as one": lambda: Tokens(lambda h: h[:, 1:3].mean(1)),
    "normalised over tokens": lambda: Tokens(lambda h: F.layer_norm(h, (TOKENS, WIDTH))[:, 0]),
    "causal attention's": lambda: Attention(2, is_causal=True),
}
CRITICS = PICKED | WHOLE


def _batch(name: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (n, 3, 8, 8) if name == "a class token" else (n, TOKENS, WIDTH)
    return *(torch.randn(shape, dtype=torch.float64) for _ in range(2)), torch.rand(n, dtype=torch.float64)


def _assert_same(found: Tensor | None, wanted: Tensor | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None:
        torch.testing.assert_close(found, wanted)


def _plan(critic: nn.Module, x: Tensor) -> Plan:
    graph = Graph([critic(x.requires_grad_())])
    (at,) = (k for k, leaf in enumerate(graph.leaves) if leaf is x)
    return picked.planned(graph.key, {at: False}, len(x), 0)


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", CRITICS)
def test_a_step_has_pytorchs_value_and_gradients(name: str, n: int, penalty: str) -> None:
    torch.manual_seed(0)
    critic, batch = CRITICS[name]().double(), _batch(name, n)
    loss, weights = gpk.CriticLoss(critic, penalty=penalty), list(critic.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        plainly = plain_loss(critic, *batch, penalty=penalty, weight=loss.penalty_weight)
    expected = torch.autograd.grad(plainly, weights, allow_unused=True)
    for _ in range(4):  # the first is by passes, the others by a program
        given = {"eps": batch[2]} if penalty == "wgan-gp" else {}
        ours = loss(*batch[:2], **given).loss
        torch.testing.assert_close(ours, plainly)
        for found, wanted in zip(torch.autograd.grad(ours, weights, allow_unused=True), expected, strict=True):
            _assert_same(found, wanted)


@pytest.mark.parametrize("name", CRITICS)
def test_a_gradient_as_a_value_has_pytorchs_gradients(name: str) -> None:
    torch.manual_seed(0)
    critic, x = CRITICS[name]().double(), _batch(name, 3)[0].requires_grad_()
    weights = [x, *critic.parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        expected = torch.autograd.grad(g.sin().sum(), weights, allow_unused=True)
    for _ in range(3):
        ours = gpk.input_gradient(critic, x)
        torch.testing.assert_close(ours, g)
        for found, wanted in zip(
            torch.autograd.grad(ours.sin().sum(), weights, allow_unused=True), expected, strict=True
        ):
            _assert_same(found, wanted)


@pytest.mark.parametrize("name", CRITICS)
def test_calls_behind_a_selection_need_its_row_alone(name: str) -> None:
    plan = _plan(CRITICS[name]().double(), _batch(name, 3)[0])
    assert (plan.picks is not None) == (name in PICKED)


@pytest.mark.parametrize("n", [1, 3])
def test_no_product_has_rows_that_are_not_selected(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a class token's last block, the pulls, pushes and gradients have one row of 17."""
    critic, sizes = VisionTransformer(16, 4, WIDTH, 2, 1).double(), {}
    real, fake = (torch.randn(n, 3, 16, 16, dtype=torch.float64) for _ in range(2))
    loss = gpk.CriticLoss(critic, penalty="r1")
    for least in (FEW, MANY):
        forget()
        monkeypatch.setattr(picked, "LEAST_FLOPS", least)
        for _ in range(3):
            loss(real, fake).loss.backward()
        sizes[least is FEW] = counted(lambda: loss(real, fake).loss.backward()).flops
    assert sizes[True] < 0.6 * sizes[False]


def test_small_products_are_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A selection costs calls, which take longer than a small product."""
    monkeypatch.undo()
    assert _plan(Tokens(lambda h: h[:, 0]), torch.randn(2, TOKENS, WIDTH)).picks is None
    assert _plan(VisionTransformer(), torch.randn(16, 3, 32, 32)).picks is not None


@pytest.mark.parametrize("backend", ["aot_eager", "gpkernels"])
@pytest.mark.parametrize("name", ["the last", "an encoder's", "a class token"])
def test_a_compiled_step_has_pytorchs_gradients(name: str, backend: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    critic = CRITICS[name]().double()
    loss, weights = gpk.CriticLoss(critic), list(critic.parameters())

    @torch.compile(backend=backend, fullgraph=True)
    def step(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
        return loss(real, fake, eps=eps).loss

    for n in (3, 3, 4, 5):  # the last ones with symbolic sizes
        batch = _batch(name, n)
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.autograd.grad(plain_loss(critic, *batch), weights)
        for found, wanted in zip(torch.autograd.grad(step(*batch), weights), expected, strict=True):
            torch.testing.assert_close(found, wanted)
