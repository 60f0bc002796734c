"""Critics whose samples interact, unusual ones, and ones that change: values and gradients are PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from comparing import PENALTIES, assert_exactly_as, assert_same, batch, gradients, recorded
from critics import (
    ACTIVATIONS,
    Noisy,
    TwoHeads,
    first,
    mlp,
    plain_loss,
    plain_penalty,
    plain_points,
)

# --- samples that mix, and calls without a rule -----------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Its backward is not its forward's derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> Tensor:
        return cotangent * 2


class Minibatch(nn.Module):
    """Minibatch standard deviation: samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.top(h * h.std(dim=0).mean())


MIXED = {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)),
    "a statistic of the batch": Minibatch,
    "a mean over the batch": lambda: Lambda(lambda h: h - h.mean(0)),
    "samples in another order": lambda: Lambda(lambda h: h.flip(0)),
    "samples by index": lambda: Lambda(lambda h: h[torch.arange(len(h) - 1, -1, -1)]),
    "the batch folded into features": lambda: Lambda(lambda h: h.reshape(4, -1).reshape(-1, 8)),
    "a custom function": lambda: Lambda(Straight.apply),
    "a layer without a rule": lambda: nn.Sequential(nn.Linear(6, 8), nn.Mish(), nn.Linear(8, 1)),
    "a detached activation": lambda: Lambda(lambda h: h.detach() * h),
    "an argument that no rule knows": lambda: Lambda(lambda h: torch.rsub(h, 1, alpha=2)),
    "a block without gradients": lambda: Lambda(_frozen_block),
}


def _frozen_block(h: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.relu(h)
    return h * mask


class Lambda(nn.Module):
    def __init__(self, function: object, squeeze: bool = False) -> None:
        super().__init__()
        self.a, self.function, self.top = nn.Linear(6, 8), function, nn.Linear(8, 1)
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        scores = self.top(self.function(self.a(x)))
        return scores.squeeze() if self.squeeze else scores


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
@pytest.mark.parametrize("name", MIXED)
def test_same_numbers_in_every_call_for(name: str, penalty: str) -> None:
    critic = MIXED[name]().double()
    real, fake, eps = batch(8, 6)
    exact = plain_loss(critic, real, fake, eps, "gan", penalty)
    wanted = gradients(exact, critic)
    loss = gpk.CriticLoss(critic, objective="gan", penalty=penalty)
    for _ in range(5):
        ours = loss(real, fake, eps=eps).loss
        torch.testing.assert_close(ours, exact)
        assert_same(gradients(ours, critic), wanted)


def test_dropout_draws_as_in_pytorch() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Mish(), nn.Linear(8, 1))
    real, fake, eps = batch(5, 6, dtype=torch.float32)
    points = plain_points(real, fake, eps, "wgan-gp")
    torch.manual_seed(5)
    exact = plain_penalty(critic, points)
    torch.manual_seed(5)
    torch.testing.assert_close(gpk.gradient_penalty(critic, real, fake, eps=eps), exact)


@pytest.mark.parametrize("first", [nn.Identity(), nn.Flatten()], ids=["itself", "a view of it"])
def test_the_callers_batch_is_never_written(first: nn.Module) -> None:
    critic = nn.Sequential(first, nn.ReLU(True), nn.Linear(6, 1))
    real = torch.randn(4, 3, 2) if isinstance(first, nn.Flatten) else torch.randn(4, 6)
    before = real.clone()
    with pytest.raises(RuntimeError, match="in-place"):  # as in PyTorch
        gpk.r1_penalty(critic, real)
    assert torch.equal(real, before)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_one_tensor_may_be_both_real_and_fake(activation: str, penalty: str) -> None:
    critic = mlp(6, 8, 1, activation=ACTIVATIONS[activation]).double()
    real, _, eps = batch(5, 6)
    exact = plain_loss(critic, real, real, eps, "gan", penalty)
    loss = gpk.CriticLoss(critic, objective="gan", penalty=penalty)(real, real, eps=eps).loss
    torch.testing.assert_close(loss, exact)
    assert_same(gradients(loss, critic), gradients(exact, critic))


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r2"])
def test_spectral_norm_in_training_takes_as_many_steps_as_in_pytorch(penalty: str) -> None:
    layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1)]
    for extra in ([], [nn.Mish()]):
        critic = nn.Sequential(*layers, *extra).double()
        twin = copy.deepcopy(critic)
        real, fake, eps = batch(5, 6)
        exact = plain_loss(twin, real, fake, eps, penalty=penalty)
        loss = gpk.CriticLoss(critic, penalty=penalty)(real, fake, eps=eps).loss
        torch.testing.assert_close(loss, exact)
        assert_same(gradients(loss, critic), gradients(exact, twin))


class Shared(nn.Module):
    """One norm used twice on one sample: its gradients are summed, and share no memory with anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.top = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        return self.top(torch.tanh(h + self.norm(torch.relu(h))) + h)


class ByHand(nn.Module):
    """Shapes and masks that only one batch size fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(6, 8), nn.Linear(8, 1)
        self.mask = torch.linspace(0, 1, 5, dtype=torch.float64).reshape(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top((torch.relu(self.a(x)) * self.mask).view(5, 8))


def _thrice_biased() -> nn.Sequential:
    critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    critic[0].bias = nn.Parameter(torch.ones(1))
    return critic


def _normed_and_overwritten() -> nn.Sequential:
    norm = nn.LayerNorm(8, elementwise_affine=False)
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def _weight_norm_removed() -> nn.Sequential:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 1))


def _into_a_constant(h: Tensor) -> Tensor:
    sums = torch.zeros(len(h), 8, dtype=h.dtype)
    sums[:, :4].add_(h[:, :4])
    return torch.relu(sums + h)


class Doubling(nn.Parameter):
    """A weight that is not what it seems."""

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is torch.nn.functional.linear else out


def _doubling() -> nn.Sequential:
    critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    critic[0].weight = Doubling(critic[0].weight.data)
    return critic


ODD = {
    "a norm whose output is overwritten": (_normed_and_overwritten, 5),
    "a leaky ReLU whose output is overwritten": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.ELU(inplace=True), nn.Linear(8, 1)),
        5,
    ),
    "a hardtanh whose output is overwritten": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(), nn.ELU(inplace=True), nn.Linear(8, 1)),
        5,
    ),
    "weight norm removed": (_weight_norm_removed, 5),
    "a constant written in place": (lambda: Lambda(_into_a_constant), 5),
    "division by a constant of integers": (lambda: Lambda(lambda h: torch.relu(h) / torch.tensor(3)), 5),
    "division by its own batch size": (lambda: Lambda(lambda h: torch.relu(h) / len(h)), 5),
    "a subtraction from a number": (lambda: Lambda(lambda h: torch.rsub(torch.ones(8, dtype=h.dtype), h).tanh()), 5),
    "a weight of another class": (_doubling, 5),
    "a norm shared on one sample": (Shared, 1),
    "a batch size by hand": (ByHand, 5),
    "a bias of one number": (_thrice_biased, 5),
    "scores squeezed to a scalar": (lambda: Lambda(torch.relu, squeeze=True), 1),
    "channel dropout of two axes": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout1d(0.0), nn.Linear(8, 1)), 5),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", ODD)
def test_same_numbers_for(name: str, penalty: str) -> None:
    make, n = ODD[name]
    critic = make().double()
    real, fake, eps = batch(n, 6)
    exact = plain_loss(critic, real, fake, eps, "gan", penalty)
    loss = gpk.CriticLoss(critic, objective="gan", penalty=penalty)(real, fake, eps=eps).loss
    torch.testing.assert_close(loss, exact)
    assert_same(gradients(loss, critic), gradients(exact, critic))


def test_consistency_of_several_scores_a_sample() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    noisy = Noisy(critic)
    real, fake, eps = batch(5, 6)
    loss = recorded(noisy, penalty="r1", consistency_weight=2.0)
    parts = loss(real, fake, eps=eps)
    on_fake, on_real, again = noisy.drawn
    noisy.fixed = [on_real, on_fake, on_real, again]
    with gpk.fast_double_backward():
        exact = gpk.CriticLoss(noisy, penalty="r1", consistency_weight=2.0)(real, fake, eps=eps)
    torch.testing.assert_close(parts.loss, exact.loss)
    assert_same(gradients(parts.loss, noisy), gradients(exact.loss, noisy))


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
def test_batch_norm_counts_its_passes_as_in_pytorch() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    twin = copy.deepcopy(critic)
    real, fake, eps = batch(5, 6)
    gpk.CriticLoss(critic)(real, fake, eps=eps)
    plain_loss(twin, real, fake, eps)
    for ours, exact in zip(critic.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, exact)


# --- a critic that changes is never seen as it was --------------------------------------------------------------------


def _check(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> None:
    exact = plain_loss(critic, real, fake, eps)
    ours = gpk.CriticLoss(critic)(real, fake, eps=eps).loss
    tolerance = 1e-10 if real.dtype == torch.float64 else 1e-5
    assert_same(gradients(ours, critic), gradients(exact, critic), tolerance)


class Fading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.a, self.b, self.top = 0.1, nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.relu(self.alpha * self.a(x) + (1 - self.alpha) * self.b(x)))


def test_changes_after_the_first_use_are_seen() -> None:
    real, fake, eps = batch(5, 6)
    critic = Fading().double()
    _check(critic, real, fake, eps)
    critic.alpha = 0.9
    _check(critic, real, fake, eps)
    critic.a = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    _check(critic, real, fake, eps)
    critic.b.weight.requires_grad_(False)
    _check(critic, real, fake, eps)
    _check(critic, real[:3], fake[:3], eps[:3])
    critic.float()
    _check(critic, real.float(), fake.float(), eps.float())
    critic.a = nn.Sequential(nn.Linear(6, 8), nn.Mish())
    _check(critic, real.float(), fake.float(), eps.float())
    critic.a = nn.Linear(6, 8)
    _check(critic, real.float(), fake.float(), eps.float())
    recorded(critic)(real.float(), fake.float())


def test_train_and_eval_are_told_apart() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    real, fake, eps = batch(5, 6)
    loss = gpk.CriticLoss(critic)
    assert loss(real, fake, eps=eps).loss != loss(real, fake, eps=eps).loss
    critic.eval()
    _check(critic, real, fake, eps)


# --- only what is asked for -------------------------------------------------------------------------------------------


def test_no_grad_gives_values_alone() -> None:
    critic = mlp(6, 8, 1).double()
    real, fake, eps = batch(5, 6)
    exact = plain_loss(critic, real, fake, eps)
    with torch.no_grad():
        parts = gpk.CriticLoss(critic)(real, fake, eps=eps)
        penalty = gpk.gradient_penalty(critic, real, fake, eps=eps)
    assert not parts.loss.requires_grad
    assert not penalty.requires_grad
    torch.testing.assert_close(parts.loss, exact.detach())


def test_a_frozen_critic_gives_values_without_a_graph() -> None:
    critic = mlp(6, 8, 1).requires_grad_(False)
    real, fake, eps = batch(5, 6, dtype=torch.float32)
    assert not gpk.CriticLoss(critic)(real, fake, eps=eps).loss.requires_grad
    assert not gpk.gradient_penalty(critic, real, fake, eps=eps).requires_grad


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_a_frozen_critic_with_a_call_without_a_rule(penalty: str) -> None:
    critic = Lambda(lambda h: h.cumprod(1)).double()
    real, fake, eps = batch(5, 6)
    exact = plain_loss(critic, real, fake, eps, penalty=penalty).detach()
    loss = gpk.CriticLoss(critic.requires_grad_(False), penalty=penalty)
    for _ in range(3):
        ours = loss(real, fake, eps=eps).loss
        assert not ours.requires_grad
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("penalty", ["none", "wgan-gp", "r1"])
def test_weights_of_a_head_that_no_loss_uses_have_no_gradient(penalty: str) -> None:
    critic = TwoHeads().double()
    real, fake, eps = batch(5, 6)
    loss = gpk.CriticLoss(critic, penalty=penalty)
    for _ in range(3):
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps, penalty=penalty), critic)
        assert_exactly_as(gpk.r1_penalty(critic, real), plain_penalty(critic, real, 0.0), critic)


def test_backward_twice_and_accumulation_add_up() -> None:
    critic = mlp(6, 8, 1).double()
    real, fake, eps = batch(6, 6)
    loss = gpk.CriticLoss(critic)(real, fake, eps=eps).loss
    (loss / 2).backward(retain_graph=True)
    (loss / 2).backward()
    whole = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        (gpk.CriticLoss(critic)(real[part], fake[part], eps=eps[part]).loss / 2).backward()
    assert_same([p.grad for p in critic.parameters()], whole)
    assert first(critic(real)).shape == (6, 1)


@pytest.mark.parametrize("n", [2, 6])
def test_rows_of_a_weight_may_be_picked_by_the_samples_numbers(n: int) -> None:
    table = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    first = nn.Linear(6, 6).double()
    first.register_parameter("table", table)

    def critic(x: Tensor) -> Tensor:
        return (torch.tanh(first(x)) * table[torch.arange(len(x))]).sum(1)

    for _ in range(4):
        real, fake, eps = batch(n, 6)
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
        assert_exactly_as(ours, plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp")), first)


def _with_a_slice_written(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, 1:3] = h[:, 1:3]
    return out


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.fmod(h, 0.7),
        lambda h: torch.nan_to_num(h),
        lambda h: torch.addcdiv(h, h.detach(), h.detach().square() + 1),
        lambda h: h**0,
        _with_a_slice_written,
        lambda h: torch.fmod(h, 0.7).sin(),
        lambda h: torch.nan_to_num(h) * h,
    ],
)
def test_a_bias_that_the_penalty_does_not_reach_has_no_gradient(function: Callable[[Tensor], Tensor]) -> None:
    first, top = nn.Linear(6, 6).double(), nn.Linear(6, 1).double()
    critic = nn.ModuleList([first, top])

    def scores(x: Tensor) -> Tensor:
        return top(function(first(x))) + x.square().sum(1, keepdim=True)

    for _ in range(4):
        real, fake, eps = batch(3, 6)
        ours = gpk.gradient_penalty(scores, real, fake, eps=eps)
        assert_exactly_as(ours, plain_penalty(scores, plain_points(real, fake, eps, "wgan-gp")), critic)
        x = real.clone().requires_grad_()
        (exact,) = torch.autograd.grad(scores(x).sum(), x, create_graph=True)
        assert_exactly_as(gpk.input_gradient(scores, real).exp().sum(), exact.exp().sum(), critic)
