"""Detection of whether the samples of a loss can be one batch, on critics whose samples interact outside the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_exactly_as, batch
from critics import plain_loss

pytestmark = pytest.mark.usefixtures("loop")
N, WIDTH = 5, 6
TABLE = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(-1, 1)
ROWS = torch.linspace(0, 1, N, dtype=torch.float64).reshape(N, 1)


class Critic(nn.Module):
    """function: of the hidden layer and the module, whose ``calls`` count from 1."""

    def __init__(self, function: Callable[[Tensor, Critic], Tensor]) -> None:
        super().__init__()
        self.first, self.top, self.function = nn.Linear(WIDTH, 8), nn.Linear(8, 1), function
        self.drop, self.switched = nn.Dropout(0.5), False
        self.running = torch.zeros(8, dtype=torch.float64)
        if function is _kept_state:  # with a buffer, R1 has a pass of its own
            del self.running
            self.register_buffer("running", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.function(torch.tanh(self.first(x)), self))


def _in_place_constant(h: Tensor, _: Critic) -> Tensor:
    shift = torch.zeros(8, dtype=h.dtype)
    shift += h.detach().mean(0)
    return h - shift


def _sorted_out_of_the_graph(h: Tensor, _: Critic) -> Tensor:
    with torch.no_grad():
        order = h[:, 0].argsort()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(h))
    return h * (1 + rank[:, None] / 10)


def _listed(h: Tensor, _: Critic) -> Tensor:
    low = min(h[:, 0].tolist())
    return h - low


def _branching(h: Tensor, _: Critic) -> Tensor:
    return h.sin() if h.mean() > 0 else h.cos()


def _iterated(h: Tensor, _: Critic) -> Tensor:
    rows = [h[0]]
    for row in h[1:]:
        rows.append(row + 0.1 * rows[-1].detach())
    return torch.stack(rows)


def _kept_state(h: Tensor, critic: Critic) -> Tensor:
    critic.running = 0.5 * critic.running + h.detach().mean(0)
    return h - critic.running.mean()


# Each sees the batch by other means than the graph.
HIDDEN: dict[str, Callable[[Tensor, Critic], Tensor]] = {
    "a detached mean": lambda h, _: h - h.detach().mean(0),
    "a detached largest": lambda h, _: h / h.detach().abs().amax(),
    "the data's mean": lambda h, _: h - h.data.mean(0),
    "a table cut to the batch": lambda h, _: h * TABLE[: len(h)],
    "a table cut by the shape": lambda h, _: h * TABLE[: h.shape[0]],
    "a table from its end": lambda h, _: h + TABLE[-h.size(0) :].sin(),
    "a table at the samples' places": lambda h, _: h * TABLE[torch.arange(len(h))],
    "places spaced over the batch": lambda h, _: h * torch.linspace(0, 1, len(h), dtype=h.dtype)[:, None],
    "an average over what is given": lambda h, _: h / len(h),
    "a power of the number of samples": lambda h, _: h * h.shape[0] ** 0.5,
    "the size of a tensor": lambda h, _: h * (h.numel() / 64),
    "a reshape by hand": lambda h, _: h.view(N, 2, 4).sin().flatten(1) if len(h) == N else h.view(-1, 8).cos(),
    "the batch folded by hand": lambda h, _: (h.reshape(-1, N, 8) + ROWS).reshape(-1, 8),
    "groups of five": lambda h, _: (h.view(-1, 5, 8) - h.detach().view(-1, 5, 8).mean(1, keepdim=True)).view(-1, 8),
    "a value read": lambda h, _: h * (1 + abs(h[0, 0].item())),
    "a sum read": lambda h, _: h / (1 + float(h.detach().square().sum())),
    "values read as a list": _listed,
    "through NumPy": lambda h, _: h * torch.from_numpy(np.asarray(h.detach().numpy().mean(0))),
    "through NumPy, by its buffer": lambda h, _: h * float(np.abs(h.detach().numpy()).max()),
    "a mask from a transposed value": lambda h, _: h * (h.t() > 0).reshape(h.shape),
    "a mask from the next sample": lambda h, _: h * (h.roll(1, 0) > 0),
    "a mask of what is above the mean": lambda h, _: torch.where(h > h.detach().mean(0), h, 0.3 * h),
    "a mask that one sample sets": lambda h, _: h.masked_fill(h[:1] > 0, 0.5),
    "a choice by the whole batch": _branching,
    "an order out of the graph": _sorted_out_of_the_graph,
    "the best sample": lambda h, _: h * h[h[:, 0].argmax()].detach(),
    "samples by index": lambda h, _: h * h.detach()[torch.randperm(len(h), generator=torch.Generator().manual_seed(3))],
    "a constant that is written": _in_place_constant,
    "samples in turn": _iterated,
    "a state": _kept_state,
    "batch norm of what is detached": lambda h, _: h + F.batch_norm(h.detach(), None, None, training=True),
    "a product of detached samples": lambda h, _: h @ (h.detach().t() @ h.detach()) / 5,
    "a constant row for each": lambda h, _: h * ROWS.repeat(len(h) // N, 1),
    "a tensor of the number of samples": lambda h, _: h * torch.tensor([float(len(h))], dtype=h.dtype),
    "a tensor of the shape": lambda h, _: h / torch.tensor(h.shape).prod(),
    "an array of the number of samples": lambda h, _: h * torch.as_tensor(np.full(8, len(h) / 7)),
    "filled with the number of samples": lambda h, _: h * torch.full((8,), len(h), dtype=h.dtype),
    "filled with it, like the samples": lambda h, _: h * h.new_full((8,), len(h)),
    "a column by the number of samples": lambda h, _: h + h[:, [len(h) % 8]],
    "a column by it, selected": lambda h, _: h + h[:, len(h) % 8][:, None],
    "columns up to the number of samples": lambda h, _: h + h[:, : len(h) - 2].sum(1, keepdim=True),
    "columns rolled by it": lambda h, _: h + torch.roll(h, (len(h),), (1,)),
    "columns padded by it": lambda h, _: h + F.pad(h, (0, len(h))).mean(1, keepdim=True),
    "ones summed": lambda h, _: h / torch.ones(len(h), 8, dtype=h.dtype).sum(0),
    "more ones summed": lambda h, _: h / torch.ones(len(h) + 1, dtype=h.dtype).sum(),
    "twice as many ones summed": lambda h, _: h / torch.zeros(2 * len(h), 1, dtype=h.dtype).add(1).sum(),
    "ones counted": lambda h, _: h * torch.ones_like(h).cumsum(0),
    "ones counted along another axis": lambda h, _: (
        (h.view(-1, 2, 4).transpose(0, 1) * torch.ones(1, len(h), 1, dtype=h.dtype).cumsum(1))
        .transpose(0, 1)
        .flatten(1)
    ),
    "a product of ones": lambda h, _: h + torch.ones(1, len(h), dtype=h.dtype) @ torch.ones_like(h),
}

# The same, visible in the graph.
SHOWN: dict[str, Callable[[Tensor, Critic], Tensor]] = {
    "a mean": lambda h, _: h - h.mean(0),
    "a spread": lambda h, _: h * h.std(0).mean(),
    "another order": lambda h, _: h + h.flip(0),
    "a product of samples": lambda h, _: torch.tanh(h @ h.t()) @ h,
    "batch norm": lambda h, _: F.batch_norm(h, None, None, training=True),
    "one sample for all": lambda h, _: h * h[:1],
    "features and samples exchanged": lambda h, _: h.t().reshape(len(h), -1),
    "a batch of tokens": lambda h, _: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
}


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
@pytest.mark.parametrize("name", [*HIDDEN, *SHOWN])
def test_a_critic_whose_samples_mix_has_pytorchs_numbers_in_every_call(name: str, penalty: str) -> None:
    critic = Critic({**HIDDEN, **SHOWN}[name]).double()
    loss = gpk.CriticLoss(critic, objective="gan", penalty=penalty)
    for _ in range(6):
        real, fake, eps = batch(N, WIDTH)
        _same_in_plain_pytorch(critic, loss, real, fake, eps, penalty)


def _same_in_plain_pytorch(
    critic: Critic, loss: gpk.CriticLoss, real: Tensor, fake: Tensor, eps: Tensor, penalty: str = "wgan-gp"
) -> None:
    """A state that depends on the order of the passes is given back between the two."""
    before = critic.running.clone()
    ours = loss(real, fake, eps=eps).loss
    after, critic.running = critic.running, before
    exact = plain_loss(critic, real, fake, eps, loss.objective, penalty)
    assert_exactly_as(ours, exact, critic)
    torch.testing.assert_close(after, critic.running)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [*HIDDEN, *SHOWN])
def test_what_is_switched_on_later_is_seen(name: str, at: int) -> None:
    function = {**HIDDEN, **SHOWN}[name]
    critic = Critic(lambda h, critic: function(h, critic) if critic.switched else h.sin()).double()
    loss = gpk.CriticLoss(critic)
    for call in range(7):
        critic.switched = call >= at
        _same_in_plain_pytorch(critic, loss, *batch(N, WIDTH))


@pytest.mark.parametrize("name", [*HIDDEN, *SHOWN])
def test_what_is_switched_on_and_off_is_seen(name: str) -> None:
    function = {**HIDDEN, **SHOWN}[name]
    critic = Critic(lambda h, critic: function(h, critic) if critic.switched else h.sin()).double()
    loss = gpk.CriticLoss(critic)
    for switched in (False, True, False, False, True, False, False):
        critic.switched = switched
        _same_in_plain_pytorch(critic, loss, *batch(N, WIDTH))


@pytest.mark.parametrize("name", SHOWN)
def test_one_batch_by_force_is_refused_where_samples_mix(name: str) -> None:
    critic = Critic(SHOWN[name]).double()
    loss = gpk.CriticLoss(critic, together=True)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"^together"):
            loss(*batch(N, WIDTH)[:2])


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
@pytest.mark.parametrize("training", [(1, 1, 1, 0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 1, 1, 0), (1, 0, 1, 0, 1, 0, 0, 0)])
def test_training_and_evaluation_are_told_apart(training: tuple[int, ...]) -> None:
    critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    loss = gpk.CriticLoss(critic)
    for mode in training:
        critic.train(bool(mode))
        real, fake, eps = batch(N, WIDTH)
        before = {key: x.clone() for key, x in critic.state_dict().items()}
        ours = loss(real, fake, eps=eps).loss
        critic.load_state_dict(before)
        assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
def test_a_part_of_the_critic_that_is_set_to_training_is_seen() -> None:
    critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double().eval()
    loss = gpk.CriticLoss(critic)
    for call in range(7):
        critic[1].train(call in (4, 5))
        real, fake, eps = batch(N, WIDTH)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)


# Independent samples, despite appearances: one batch from the third call on.
KEEPING: dict[str, Callable[[Tensor, Critic], Tensor]] = {
    "ReLU": lambda h, _: torch.relu(h),
    "a choice": lambda h, _: torch.where(h > 0, h, 0.2 * h),
    "a constant for all": lambda h, _: h * TABLE[:8, 0],
    "a view of the batch": lambda h, _: h.view(h.shape[0], 2, 4).sin().flatten(1),
    "a view by -1": lambda h, _: h.view(-1, 2, 4).sin().view(len(h), -1),
    "layer norm": lambda h, _: F.layer_norm(h, (8,)),
    "zeros": lambda h, _: torch.cat([h[:, 1:], h.new_zeros(len(h), 1)], 1),
    "tokens": lambda h, _: torch.softmax(h.view(-1, 4, 2) @ h.view(-1, 4, 2).mT, 2).flatten(1)[:, :8],
    "group norm": lambda h, _: F.group_norm(h, 2),
    "the largest": lambda h, _: h - h.max(1, keepdim=True).values,
    "a causal mask": lambda h, _: h @ torch.ones(8, 8, dtype=h.dtype).tril(),
    "positions": lambda h, _: h + torch.zeros(8, dtype=h.dtype).add(1).cumsum(0),
    "a normalised weight": lambda h, critic: F.linear(h, F.normalize(critic.first.weight @ critic.first.weight.mT)),
}


@pytest.mark.parametrize("name", KEEPING)
def test_samples_that_keep_to_themselves_become_one_batch(name: str) -> None:
    rows: list[int] = []

    def watched(h: Tensor, critic: Critic) -> Tensor:
        rows.append(h.size(0))
        return KEEPING[name](h, critic)

    critic = Critic(watched).double()
    loss = gpk.CriticLoss(critic)
    for expected in ([N] * 3, [N] * 3, [3 * N], [3 * N], [3 * N]):
        real, fake, eps = batch(N, WIDTH)
        rows.clear()
        ours = loss(real, fake, eps=eps).loss
        assert rows == expected
        assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


def test_masks_of_dropout_differ_from_sample_to_sample() -> None:
    """In one batch each sample has its own mask, as apart: the mean loss is the same."""
    critic = Critic(lambda h, critic: critic.drop(h)).double()
    real, fake, eps = batch(N, WIDTH)

    def mean(together: bool) -> float:
        torch.manual_seed(0)
        loss = gpk.CriticLoss(critic, together=together)
        with torch.no_grad():
            return sum(loss(real, fake, eps=eps).loss.item() for _ in range(3000)) / 3000

    assert mean(True) == pytest.approx(mean(False), rel=0.1)


class Counting(nn.Module):
    """Counts its calls in an attribute, which it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.top, self.calls = nn.Linear(WIDTH, 8), nn.Linear(8, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.first(x)
        return self.top((h.sin() if self.calls % 5 == 0 else h.tanh()) / self.calls)


def test_a_critic_that_counts_its_calls_is_called_as_often_as_in_pytorch() -> None:
    critic = Counting().double()
    loss = gpk.CriticLoss(critic)
    for call in range(7):
        real, fake, eps = batch(N, WIDTH)
        ours = loss(real, fake, eps=eps).loss
        critic.calls = 3 * call
        assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


@pytest.mark.parametrize(
    "drawn",
    [
        lambda h: torch.rand(8, dtype=h.dtype),
        lambda h: torch.randint(0, 3, (8,)),
        lambda h: F.dropout(torch.ones(8, dtype=h.dtype)),
        lambda h: torch.rand(len(h), 8, dtype=h.dtype)[:1],
    ],
)
def test_numbers_drawn_for_all_samples_of_a_call_are_drawn_in_each(drawn: Callable[[Tensor], Tensor]) -> None:
    critic = Critic(lambda h, _: h * drawn(h)).double()
    loss = gpk.CriticLoss(critic)
    for seed in range(5):
        real, fake, eps = batch(N, WIDTH)
        torch.manual_seed(seed)
        ours = loss(real, fake, eps=eps).loss
        torch.manual_seed(seed)
        assert_exactly_as(ours, plain_loss(critic, real, fake, eps), critic)


def test_numbers_drawn_for_each_sample_leave_one_batch() -> None:
    rows: list[int] = []

    def noisy(h: Tensor, _: Critic) -> Tensor:
        rows.append(len(h))
        return h + 0.1 * torch.rand_like(h) + torch.rand(len(h), dtype=h.dtype)[:, None]

    loss = gpk.CriticLoss(Critic(noisy).double())
    for _ in range(4):
        loss(*batch(N, WIDTH)[:2])
    assert rows == [N] * 6 + [3 * N] * 2
