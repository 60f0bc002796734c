"""Side effects of a call: on the critic, on random number generators, on memory, and on modes and hooks."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import gpkernels as gpk
from comparing import assert_exactly_as, assert_same, batch, gradients
from critics import mlp, plain_loss, plain_penalty, plain_points
from gpkernels import backends

N, WIDTH = 5, 6


class Counting(nn.Module):
    """Counts its calls and the rows of each."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or mlp(WIDTH, 8, 1)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.body(x)


# --- how often --------------------------------------------------------------------------------------------------------


def test_forward_is_called_once_a_group_or_once_for_all() -> None:
    critic = Counting().double()
    loss = gpk.CriticLoss(critic)
    for rows in ([N] * 3, [N] * 3, [3 * N], [3 * N], [3 * N]):
        critic.rows.clear()
        loss(*batch(N, WIDTH)[:2])
        assert critic.rows == rows


@pytest.mark.parametrize("penalty", ["r1", "r2"])
def test_scores_and_penalty_of_one_batch_share_a_call(penalty: str) -> None:
    critic = Counting().double()
    loss = gpk.CriticLoss(critic, penalty=penalty)
    for call in range(5):
        critic.rows.clear()
        loss(*batch(N, WIDTH)[:2])
        assert critic.rows in ([N] * 2, [2 * N] if call > 1 else None)


@pytest.mark.parametrize(("together", "rows"), [(True, [3 * N]), (False, [N] * 3)])
def test_together_says_how(together: bool, rows: list[int]) -> None:
    critic = Counting().double()
    loss = gpk.CriticLoss(critic, together=together)
    for _ in range(4):
        critic.rows.clear()
        loss(*batch(N, WIDTH)[:2])
        assert critic.rows == rows


def test_a_penalty_calls_once() -> None:
    critic, (real, fake, _) = Counting().double(), batch(N, WIDTH)
    for call in PENALTIES.values():
        for _ in range(4):
            critic.rows.clear()
            call(critic, real, fake)
            assert critic.rows == [N]


PENALTIES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "gradient_penalty": lambda critic, real, fake: gpk.gradient_penalty(critic, real, fake),
    "r1_penalty": lambda critic, real, fake: gpk.r1_penalty(critic, real),
    "r2_penalty": lambda critic, real, fake: gpk.r2_penalty(critic, fake),
    "dragan_penalty": lambda critic, real, fake: gpk.dragan_penalty(critic, real),
    "eikonal_loss": lambda critic, real, fake: gpk.eikonal_loss(critic, real),
}
ALL: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    **PENALTIES,
    "CriticLoss": lambda critic, real, fake: gpk.CriticLoss(critic)(real, fake).loss,
    "CriticLoss, R1": lambda critic, real, fake: gpk.CriticLoss(critic, penalty="r1")(real, fake).loss,
    "CriticLoss, together": lambda critic, real, fake: gpk.CriticLoss(critic, together=True)(real, fake).loss,
}

# --- the state of a critic --------------------------------------------------------------------------------------------


class Running(nn.Module):
    """Module with a buffer that each pass rebinds, another that it writes to, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(WIDTH, 8, 1)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("passes", torch.zeros(()))
        self.largest = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.passes += 1
        self.largest = max(self.largest, x.abs().max().item())
        return self.body(x - self.mean)


def _normed(momentum: float | None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU(), nn.Linear(8, 1))


def _spectral() -> nn.Sequential:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 8)), nn.ReLU(), nn.Linear(8, 1))


def _spectral_by_a_hook() -> nn.Sequential:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(WIDTH, 8)), nn.ReLU(), nn.Linear(8, 1))


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: _normed(0.1),
    "batch norm with the mean of all": lambda: _normed(None),
    "spectral norm": _spectral,
    "spectral norm by a hook": _spectral_by_a_hook,
    "buffers": Running,
}


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm`")
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
@pytest.mark.parametrize("name", STATEFUL)
def test_buffers_and_numbers_are_as_plain_pytorch_leaves_them(name: str, penalty: str) -> None:
    critic = STATEFUL[name]().double()
    twin = copy.deepcopy(critic)
    loss = gpk.CriticLoss(critic, penalty=penalty)
    for _ in range(6):
        real, fake, eps = batch(N, WIDTH)
        ours = loss(real, fake, eps=eps).loss
        exact = plain_loss(twin, real, fake, eps, penalty=penalty)
        torch.testing.assert_close(ours, exact)
        assert_same(gradients(ours, critic), gradients(exact, twin))
        for (key, a), b in zip(critic.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=key)
        assert vars(critic).get("largest") == vars(twin).get("largest")


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
def test_evaluation_changes_no_buffer() -> None:
    critic = _normed(0.1).double().eval()
    before = copy.deepcopy(dict(critic.named_buffers()))
    loss = gpk.CriticLoss(critic)
    for _ in range(5):
        real, fake, eps = batch(N, WIDTH)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)
    for key, buffer in critic.named_buffers():
        assert torch.equal(buffer, before[key])


def test_gradients_are_left_alone_until_backward() -> None:
    critic = mlp(WIDTH, 8, 1).double()
    real, fake, _ = batch(N, WIDTH)
    for p in critic.parameters():
        p.grad = torch.ones_like(p)
    for call in ALL.values():
        call(critic, real, fake)
        assert all(p.grad.eq(1).all() for p in critic.parameters())


# --- random numbers ---------------------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """Draws from three generators, and drops."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.top = nn.Linear(WIDTH, 8), nn.Dropout(0.5), nn.Linear(8, 1)
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn += [random.random(), float(np.random.rand())]
        h = self.drop(torch.relu(self.first(x))) * self.drawn[-1] + 0.1 * torch.randn(8, dtype=x.dtype)
        return self.top(F.dropout(h, 0.25) * self.drawn[-2])


def _seed() -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("objective", ["wgan", "gan"])
def test_random_numbers_apart_are_those_of_plain_pytorch(objective: str) -> None:
    critic = Drawing().double()
    loss = gpk.CriticLoss(critic, objective=objective, together=False)
    for _ in range(5):
        real, fake, eps = batch(N, WIDTH)
        _seed()
        ours, after = loss(real, fake, eps=eps).loss, _states()
        drawn, critic.drawn = critic.drawn, []
        _seed()
        exact = plain_loss(critic, real, fake, eps, objective)
        assert after == _states()
        assert drawn == critic.drawn
        critic.drawn = []
        assert_exactly_as(ours, exact, critic)


def test_random_numbers_of_a_penalty_are_those_of_plain_pytorch() -> None:
    critic = Drawing().double()
    for _ in range(5):
        real, fake, eps = batch(N, WIDTH)
        _seed()
        ours, after = gpk.gradient_penalty(critic, real, fake, eps=eps), _states()
        _seed()
        exact = plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"))
        assert after == _states()
        assert_exactly_as(ours, exact, critic)


# --- errors -----------------------------------------------------------------------------------------------------------


class Unwell(Exception):
    pass


def _often(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


class Failing(Counting):
    """Raises in one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        if len(self.rows) == self.at:
            raise Unwell(self.at)
        return self.body(x)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_the_critics_own_error_passes_and_it_is_not_run_again(at: int) -> None:
    critic = Failing(at).double()
    loss = gpk.CriticLoss(critic, together=False)
    real, fake, _ = batch(N, WIDTH)
    with pytest.raises(Unwell) as raised:
        _often(lambda: loss(real, fake), at)
    assert raised.value.args == (at,)
    assert len(critic.rows) == at
    critic.rows.clear()
    critic.at = 0
    assert_same([loss(real, real).adversarial], [torch.zeros((), dtype=torch.float64)])


@pytest.mark.parametrize("name", PENALTIES)
def test_the_critics_own_error_passes_out_of_a_penalty(name: str) -> None:
    real, fake, _ = batch(N, WIDTH)
    for at in (1, 2, 3, 4):
        critic = Failing(at).double()
        with pytest.raises(Unwell):
            _often(lambda critic=critic: PENALTIES[name](critic, real, fake), at)
        assert len(critic.rows) == at


@pytest.mark.parametrize("pooled", [lambda s: s.mean(), lambda s: s.view(-1, 2).mean(1), lambda s: s[:1]])
def test_fewer_scores_than_samples_are_refused_and_the_cure_is_named(pooled: Callable[[Tensor], Tensor]) -> None:
    body = mlp(WIDTH, 8, 1).double()
    real, fake, _ = batch(4, WIDTH)
    for name, call in ALL.items():
        if name != "eikonal_loss":
            with pytest.raises(ValueError, match=r"critic.*(4|12) samples.*pack"):
                call(lambda x: pooled(body(x)), real, fake)


@pytest.mark.parametrize("name", ALL)
def test_tangents_of_weights_are_refused(name: str) -> None:
    critic = mlp(WIDTH, 8, 1).double()
    real, fake, _ = batch(N, WIDTH)
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(critic[0].weight.detach().requires_grad_(), torch.ones(8, WIDTH).double())

        def dual(x: Tensor) -> Tensor:
            return critic[2](torch.relu(F.linear(x, weight, critic[0].bias)))

        with pytest.raises((RuntimeError, NotImplementedError)):
            ALL[name](dual, real, fake)


# --- memory -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _inside_drop_in(critic: Any, real: Tensor, fake: Tensor) -> Tensor:
    with gpk.fast_double_backward():
        return plain_penalty(critic, real)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        *(("MLP", name) for name in (*ALL, "fast_double_backward")),
        # Nothing tells that samples do not meet in a custom function.
        *(("custom function", name) for name in (*ALL, "fast_double_backward") if name != "CriticLoss, together"),
    ],
)
def test_no_critic_and_no_batch_is_kept_alive(layer: str, name: str, backward: bool) -> None:
    call = ALL.get(name, _inside_drop_in)
    critic = mlp(WIDTH, 8, 1) if layer == "MLP" else nn.Sequential(nn.Linear(WIDTH, 8), Twice(), nn.Linear(8, 1))
    critic = critic.double()
    weights = [weakref.ref(p) for p in critic.parameters()]
    alive = weakref.ref(critic)
    for _ in range(4):
        real, fake, _ = batch(N, WIDTH)
        value = call(critic, real, fake)
        if backward:
            value.backward()
        batches = weakref.ref(real), weakref.ref(fake)
        del value
    del real, fake, critic
    gc.collect()
    assert alive() is None
    assert all(ref() is None for ref in (*batches, *weights))


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent * ctx.saved_tensors[0]


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Squared.apply(x)


def test_a_loss_lets_go_of_its_last_batch() -> None:
    loss = gpk.CriticLoss(mlp(WIDTH, 8, 1).double())
    for _ in range(5):
        real, fake, _ = batch(N, WIDTH)
        parts = loss(real, fake)
        batches = weakref.ref(real), weakref.ref(fake)
        del parts, real, fake
        gc.collect()
        assert [ref() for ref in batches] == [None, None]


def test_activations_are_freed_without_the_collector() -> None:
    critic = Remembering().double()
    loss = gpk.CriticLoss(critic)
    with _without_collector():
        for _ in range(5):
            critic.seen.clear()
            parts = loss(*batch(N, WIDTH)[:2])
            assert [ref() for ref in critic.seen] == [None] * len(critic.seen)
            assert parts.loss.requires_grad


class Remembering(nn.Module):
    """Knows its hidden layers by weak references."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.top = nn.Linear(WIDTH, 8), nn.Linear(8, 1)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.seen.append(weakref.ref(h))
        return self.top(h)


# --- results are the user's -------------------------------------------------------------------------------------------

IN_PLACE: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "/= 2": (lambda x: x.div_(2), 0.5),
    "*= 10": (lambda x: x.mul_(10), 10.0),
    "mul_(3).add_(1)": (lambda x: x.mul_(3).add_(1), 3.0),
    "neg_": (lambda x: x.neg_(), -1.0),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("name", ALL)
def test_results_may_be_changed_in_place_before_backward(name: str, change: str) -> None:
    critic = mlp(WIDTH, 8, 1, activation=nn.Tanh).double()
    real, fake, _ = batch(N, WIDTH)
    function, factor = IN_PLACE[change]
    for _ in range(4):
        torch.manual_seed(1)
        exact = gradients(ALL[name](critic, real, fake), critic)
        torch.manual_seed(1)
        value = ALL[name](critic, real, fake)
        function(value)
        value.backward()
        assert_same([_taken(p) for p in critic.parameters()], [factor * g for g in exact])


def _taken(p: nn.Parameter) -> Tensor:
    grad, p.grad = p.grad, None
    return torch.zeros_like(p) if grad is None else grad


@pytest.mark.parametrize("options", [{}, {"penalty": "r1"}, {"penalty": "none"}, {"consistency_weight": 1.0}], ids=str)
def test_parts_share_no_memory_and_may_be_changed(options: dict[str, Any]) -> None:
    critic = mlp(WIDTH, 8, 1).double()
    loss = gpk.CriticLoss(critic, **options)
    real, fake, eps = batch(N, WIDTH)
    exact = gradients(loss(real, fake, eps=eps).loss, critic)
    for _ in range(4):
        parts = loss(real, fake, eps=eps)
        grads = torch.autograd.grad(parts.loss, list(critic.parameters()), retain_graph=True)
        places = [x.untyped_storage().data_ptr() for x in (*parts, *grads, *critic.parameters(), real, fake, eps)]
        assert len(set(places)) == len(places)
        value = parts.loss.item()
        for part in parts[1:]:
            part.mul_(3).add_(1)
        assert parts.loss.item() == value
        parts.loss.backward()
        assert_same([_taken(p) for p in critic.parameters()], exact)
        for g in grads:
            g.zero_()


def test_without_gradients_parts_share_no_memory_either() -> None:
    critic = mlp(WIDTH, 8, 1).double()
    loss = gpk.CriticLoss(critic, penalty="none")
    with torch.no_grad():
        for _ in range(4):
            parts = loss(*batch(N, WIDTH)[:2])
            assert len({x.untyped_storage().data_ptr() for x in parts}) == 4


# --- a critic that changes --------------------------------------------------------------------------------------------


def check(loss: gpk.CriticLoss, critic: nn.Module) -> None:
    """Compare several calls of one CriticLoss and of a penalty with plain PyTorch, after a change."""
    for _ in range(3):
        real, fake, eps = batch(N, WIDTH)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)
        points = plain_points(real, fake, eps, "wgan-gp")
        assert_exactly_as(gpk.gradient_penalty(critic, real, fake, eps=eps), plain_penalty(critic, points), critic)


class Equal(nn.Module):
    """All of them compare equal, and hash alike."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.body, self.factor = mlp(WIDTH, 8, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.body(x) ** (1 if self.factor == 1 else 2)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 1


def test_critics_that_compare_equal_are_kept_apart() -> None:
    critics = [Equal(1.0).double(), Equal(2.0).double(), Equal(3.0).double()]
    losses = [gpk.CriticLoss(critic) for critic in critics]
    for _ in range(2):
        for loss, critic in zip(losses, critics, strict=True):
            check(loss, critic)


def test_layers_that_are_patched_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    loss = gpk.CriticLoss(critic)
    check(loss, critic)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.tanh(x @ self.weight.t()) + self.bias)
    check(loss, critic)
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: x.sin())
    check(loss, critic)
    monkeypatch.undo()
    check(loss, critic)


def test_layers_that_are_replaced_added_or_frozen_are_seen() -> None:
    critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    loss = gpk.CriticLoss(critic)
    check(loss, critic)
    critic[1] = nn.Softplus()
    check(loss, critic)
    critic[0] = nn.Linear(WIDTH, 8, bias=False).double()
    check(loss, critic)
    critic.append(nn.Tanh())
    check(loss, critic)
    critic[2].weight.requires_grad_(False)
    check(loss, critic)
    critic[2].weight.requires_grad_(True)
    check(loss, critic)
    critic[0].register_forward_hook(lambda module, args, out: 2 * out.sin())
    check(loss, critic)
    critic[0].weight = nn.Parameter(torch.randn(8, WIDTH).double())
    check(loss, critic)
    with torch.no_grad():
        critic[0].weight.mul_(0.5)
    check(loss, critic)
    loss.critic = critic = mlp(WIDTH, 4, 1, activation=nn.SiLU).double()
    check(loss, critic)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.factor, self.slope = mlp(WIDTH, 8, 1), 1.0, 0.2

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.leaky_relu(x * self.factor, self.slope) / (1 + self.factor))


def test_numbers_that_change_are_seen() -> None:
    critic = Scaled().double()
    loss = gpk.CriticLoss(critic)
    for step in range(8):
        critic.factor, critic.slope = 0.1 * step, 0.2 if step < 5 else 0.3
        real, fake, eps = batch(N, WIDTH)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)


def test_batches_of_other_sizes_are_seen() -> None:
    critic = mlp(WIDTH, 8, 1).double()
    loss = gpk.CriticLoss(critic)
    for n in (5, 5, 5, 3, 7, 1, 5, 3):
        real, fake, eps = batch(n, WIDTH)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)


# --- without data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["C++", "Python"])
def test_critics_on_the_meta_device_give_shapes(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loop == "Python":
        monkeypatch.setattr(backends, "program", None)
    critic = mlp(WIDTH, 8, 1).to("meta")
    real, fake = torch.empty(N, WIDTH, device="meta"), torch.empty(N, WIDTH, device="meta")
    loss = gpk.CriticLoss(critic)
    for _ in range(5):
        value = loss(real, fake, eps=torch.empty(N, device="meta")).loss
        penalty = gpk.r1_penalty(critic, real)
        for result in (value, penalty):
            assert result.device.type == "meta"
            assert result.shape == ()
            for p, g in zip(critic.parameters(), gradients(result, critic), strict=True):
                assert (g.shape, g.device.type) == (p.shape, "meta")


class AsksForGradients(nn.Module):
    """An energy that makes its input require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.requires_grad_())


@pytest.mark.parametrize("together", [None, False])
def test_a_critic_that_makes_its_input_require_gradients(together: bool | None) -> None:
    critic = AsksForGradients().double()
    loss = gpk.CriticLoss(critic, penalty={"r1": 1.0, "wgan-gp": 2.0}, together=together)
    for _ in range(5):
        real, fake, eps = batch(N, WIDTH)
        r1 = plain_penalty(critic.body, real, 0.0)
        between = plain_penalty(critic.body, plain_points(real, fake, eps, "wgan-gp"))
        exact = critic.body(fake).mean() - critic.body(real).mean() + r1 + 2 * between
        parts = loss(real, fake, eps=eps)
        torch.testing.assert_close(parts.penalty["r1"], r1)
        assert_exactly_as(parts.loss, exact, critic)
