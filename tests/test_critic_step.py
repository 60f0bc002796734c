"""The critic step without wasted work gives PyTorch's numbers, for critics of every kind."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpkernels as gpk
from critics import (
    ACTIVATIONS,
    NORMS,
    PIECEWISE,
    Featured,
    MaxPooled,
    ResidualCritic,
    SkipField,
    dcgan,
    first,
    mlp,
    plain_loss,
    plain_penalty,
    plain_points,
)
from gpkernels.critic import mlp as native
from gpkernels.critic import step
from gpkernels.critic.tape import NoRule

PENALTIES = ("none", "wgan-gp", "r1", "r2")


def gradients(loss: Tensor, critic: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Gradients of every weight and input; zeros where PyTorch gives None."""
    leaves = [*(p for p in critic.parameters() if p.requires_grad), *inputs]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def recorded(critic: nn.Module, **options: object) -> gpk.CriticLoss:
    """A CriticLoss that fails where it would leave the critic to autograd."""
    loss = gpk.CriticLoss(critic, **options)

    def refuse(*_: object) -> None:
        raise AssertionError("left to autograd")

    loss._composed = refuse
    return loss


def assert_same(ours: list[Tensor], exact: list[Tensor], tolerance: float = 1e-10) -> None:
    scale = max(float(g.detach().abs().max()) for g in exact)
    for a, b in zip(ours, exact, strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance * scale


@pytest.fixture(params=["one_batch", "group_by_group"])
def _passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large batches go through an MLP differently; here both are small."""
    if request.param == "group_by_group":
        monkeypatch.setattr(native, "BATCHED_BELOW", 0)


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), 0.7 * torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=dtype)


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("objective", ["wgan", "gan"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "layer_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole_loss_of_an_mlp(activation: str, norm: bool, penalty: str, objective: str) -> None:
    critic = mlp(6, 8, 8, 1, activation=ACTIVATIONS[activation], norm=norm).double()
    real, fake, eps = batch(5, 6)
    exact = plain_loss(critic, real, fake, eps, objective, penalty)
    parts = recorded(critic, objective=objective, penalty=penalty)(real, fake, eps=eps)
    torch.testing.assert_close(parts.loss, exact)
    assert_same(gradients(parts.loss, critic), gradients(exact, critic))


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("objective", ["wgan", "gan"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("norm", NORMS)
def test_whole_loss_of_a_residual_critic(norm: str, penalty: str, objective: str) -> None:
    critic = ResidualCritic(4, 8, norm).double()
    real, fake, eps = batch(3, 3, 8, 8)
    exact = plain_loss(critic, real, fake, eps, objective, penalty)
    parts = recorded(critic, objective=objective, penalty=penalty)(real, fake, eps=eps)
    torch.testing.assert_close(parts.loss, exact)
    assert_same(gradients(parts.loss, critic), gradients(exact, critic))


OTHERS = {
    "dcgan": lambda: (dcgan(3, 4, 16), (3, 3, 16, 16)),
    "an MLP on images": lambda: (nn.Sequential(nn.Flatten(), mlp(12, 8, 8, 1, activation=nn.LeakyReLU)), (3, 3, 2, 2)),
    "max pooling": lambda: (MaxPooled(), (3, 3, 8, 8)),
    "a field with a skip": lambda: (SkipField(8, 4, 3.0), (5, 3)),
    "a map of scores": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)),
        (3, 3, 8, 8),
    ),
    "transposed convolution": lambda: (
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1, groups=1), nn.Tanh(), nn.Conv2d(4, 1, 3, 2)),
        (3, 3, 8, 8),
    ),
    "one dimension, padding same": lambda: (
        nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(24, 1)),
        (3, 3, 12),
    ),
    "three dimensions": lambda: (
        nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 1)),
        (2, 2, 5, 5, 5),
    ),
    "RMSNorm and SiLU": lambda: (nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.SiLU(), nn.Linear(8, 1)), (5, 6)),
    "weight norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1)),
        (5, 6),
    ),
    "spectral norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1)).eval(),
        (5, 6),
    ),
    "tokens": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2), nn.Flatten(), nn.Linear(8, 1)),
        (5, 4, 6),
    ),
}


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", OTHERS)
def test_whole_loss_of(name: str, penalty: str) -> None:
    critic, shape = OTHERS[name]()
    critic = critic.double()
    real, fake, eps = batch(*shape)
    critic(real)
    exact = plain_loss(critic, real, fake, eps, "gan", penalty)
    parts = recorded(critic, objective="gan", penalty=penalty)(real, fake, eps=eps)
    torch.testing.assert_close(parts.loss, exact)
    assert_same(gradients(parts.loss, critic), gradients(exact, critic))


class Odd(nn.Module):
    """Branches, a shared layer, a gate, slices, constants and scaled noise: what people write in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Linear(6, 6), nn.Linear(3, 6), nn.Linear(9, 1)
        self.register_buffer("shift", torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(2 * x - self.shift) / 3)
        h = self.a(h)  # shared
        gate = torch.sigmoid(self.b(h[:, ::2]))
        h = 1 - gate * h
        h += x
        h = torch.cat([h, h[:, :3] * x[:, 3:]], dim=1)
        return self.top(h.unsqueeze(1).transpose(1, 2).squeeze(-1))


@pytest.mark.usefixtures("_passes")
def test_whole_loss_of_an_odd_critic() -> None:
    critic = Odd().double()
    real, fake, eps = batch(4, 6)
    for penalty in PENALTIES:
        exact = plain_loss(critic, real, fake, eps, "gan", penalty)
        loss = recorded(critic, objective="gan", penalty=penalty)(real, fake, eps=eps).loss
        torch.testing.assert_close(loss, exact)
        assert_same(gradients(loss, critic), gradients(exact, critic))


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_real_and_fake_get_their_gradients(activation: str, penalty: str) -> None:
    critic = mlp(6, 8, 1, activation=ACTIVATIONS[activation]).double()
    real, fake, eps = batch(5, 6)
    real.requires_grad_(), fake.requires_grad_()
    exact = plain_loss(critic, real, fake, eps, "gan", penalty)
    loss = recorded(critic, objective="gan", penalty=penalty)(real, fake, eps=eps).loss
    wanted = gradients(exact, critic, real, fake)
    assert_same(gradients(loss, critic, real, fake), wanted)
    only = recorded(critic, objective="gan", penalty=penalty)(real.detach(), fake, eps=eps).loss
    assert_same(gradients(only, critic, fake), [*wanted[:-2], wanted[-1]])


@pytest.mark.parametrize("one_sided", [False, True], ids=["two_sided", "one_sided"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_penalty_alone(activation: str, one_sided: bool) -> None:
    critic = mlp(6, 8, 8, 1, activation=ACTIVATIONS[activation]).double()
    real, fake, eps = batch(5, 6)
    exact = plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"), 0.3, one_sided)
    ours = gpk.gradient_penalty(critic, real, fake, target=0.3, one_sided=one_sided, eps=eps)
    torch.testing.assert_close(ours, exact)
    assert_same(gradients(ours, critic), gradients(exact, critic))


@pytest.mark.usefixtures("_passes")
def test_consistency_sees_scores_and_features() -> None:
    critic = Featured(p=0.0).double()
    critic.body.append(nn.Linear(16, 16).double())
    real, fake, eps = batch(5, 6)
    torch.manual_seed(3)
    noisy = Noisy(critic).double()
    state = torch.get_rng_state()
    options = {"consistency_weight": 2.0, "feature_weight": 0.3}
    for penalty in ("wgan-gp", "r1"):
        torch.set_rng_state(state)
        parts = recorded(noisy, penalty=penalty, **options)(real, fake, eps=eps)
        noise = torch.cat(noisy.drawn)
        rows = {"wgan-gp": ("real", "again", "fake", "points"), "r1": ("fake", "again", "real")}[penalty]
        draws = dict(zip(rows, noise.split(5), strict=True))
        noisy.fixed = [draws["real"], draws["fake"], draws.get("points", draws["real"]), draws["again"]]
        exact = gpk.CriticLoss(noisy, penalty=penalty, **options)._composed(real, fake, eps)
        noisy.fixed, noisy.drawn = [], []
        for a, b in zip(parts, exact, strict=True):
            torch.testing.assert_close(a, b)
        assert parts.consistency > 0
        assert_same(gradients(parts.loss, noisy), gradients(exact.loss, noisy))


class Noisy(nn.Module):
    """A critic whose passes differ by noise that a test can fix."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic, self.drawn, self.fixed = critic, [], []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.fixed.pop(0) if self.fixed else 0.3 * torch.randn_like(x)
        self.drawn.append(noise)
        return self.critic(x + noise)


def test_dropout_keeps_one_mask_through_all_passes() -> None:
    critic = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 1)
    )
    critic = critic.double()
    points = torch.randn(5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    exact = plain_penalty(critic, points, 0.1)
    torch.manual_seed(1)
    ours = step.penalty_on_gradient(critic, points, 0.1, False)
    torch.testing.assert_close(ours, exact)
    assert_same(gradients(ours, critic), gradients(exact, critic))


@pytest.mark.parametrize("activation", PIECEWISE)
def test_drop_in_layers_are_bitwise_those_of_pytorch(activation: str) -> None:
    torch.set_num_threads(1)
    critic = mlp(6, 32, 32, 1, activation=ACTIVATIONS[activation])
    real, fake, eps = batch(16, 6, dtype=torch.float32)
    points = gpk.interpolate(real, fake, eps)
    with gpk.fast_double_backward():
        ours = gradients(plain_penalty(critic, points), critic)
    for a, b in zip(ours, gradients(plain_penalty(critic, points), critic), strict=True):
        assert torch.equal(a, b)


def test_drop_in_layers_can_be_differentiated_again() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1)).double()
    weight = critic[0].weight

    def penalty(w: Tensor, context: object) -> Tensor:
        with context:
            out = torch.func.functional_call(critic, {"0.weight": w}, (x,))
            (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            (gw,) = torch.autograd.grad(g.square().sum(), w, create_graph=True)
        return gw

    ours = penalty(weight, gpk.fast_double_backward())
    exact = penalty(weight, contextlib.nullcontext())
    assert_same([ours], [exact])
    assert_same(gradients(ours.square().sum(), critic), gradients(exact.square().sum(), critic))


@pytest.mark.parametrize("penalty", ["gradient_penalty", "CriticLoss"])
def test_a_third_derivative_raises_and_names_the_cure(penalty: str) -> None:
    critic = mlp(6, 8, 1)
    real, fake, eps = batch(5, 6, dtype=torch.float32)
    if penalty == "CriticLoss":
        loss = gpk.CriticLoss(critic)(real, fake, eps=eps).loss
    else:
        loss = gpk.gradient_penalty(critic, real, fake, eps=eps)
    with pytest.raises(RuntimeError, match="fast_double_backward"):
        torch.autograd.grad(loss, list(critic.parameters()), create_graph=True)


def test_gradgradcheck_of_a_penalty() -> None:
    critic = mlp(3, 4, 1, activation=nn.Tanh).double()
    x = torch.randn(2, 3, dtype=torch.float64)

    def penalty(w: Tensor) -> Tensor:
        def field(points: Tensor) -> Tensor:
            return torch.func.functional_call(critic, {"0.weight": w}, (points,))

        with gpk.fast_double_backward():
            return gpk.r1_penalty(field, x)

    weight = critic[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(penalty, (weight,))
    assert torch.autograd.gradgradcheck(penalty, (weight,))


convolutions = st.fixed_dictionaries(
    {
        "kernel": st.integers(1, 4),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "bias": st.booleans(),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "norm": st.sampled_from(["none", "group_norm", "instance_norm"]),
    }
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(
    layers=st.lists(convolutions, min_size=1, max_size=3),
    n=st.integers(1, 4),
    penalty=st.sampled_from(PENALTIES),
    objective=st.sampled_from(["wgan", "gan"]),
    frozen=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_convolutional_critics_stay_within_four_times_eager_error(
    layers: list[dict], n: int, penalty: str, objective: str, frozen: bool, channels_last: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    size, channels = 12, 2
    for options in layers:
        reach = options["dilation"] * (options["kernel"] - 1) + 1
        after = (size + 2 * options["padding"] - reach) // options["stride"] + 1
        if size + 2 * options["padding"] < reach or after < 3:
            continue
        activation, norm = options["activation"], options["norm"]
        settings_ = {key: options[key] for key in ("stride", "padding", "dilation", "groups", "bias")}
        modules += [nn.Conv2d(channels, 4, options["kernel"], **settings_), NORMS[norm](4, after)]
        modules.append(ACTIVATIONS[activation]())
        size, channels = after, 4
    critic = nn.Sequential(*modules, nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(1))
    real, fake, eps = batch(n, 2, 12, 12, dtype=torch.float32)
    critic(real)
    if frozen and not channels_last:  # both at once crash eager PyTorch 2.13 in its double backward
        next(critic.parameters()).requires_grad_(False)
    if channels_last:
        real, fake = (x.contiguous(memory_format=torch.channels_last) for x in (real, fake))
        critic = critic.to(memory_format=torch.channels_last)
    wide = copy.deepcopy(critic).double()
    exact = plain_loss(wide, real.double(), fake.double(), eps.double(), objective, penalty)
    eager = plain_loss(critic, real, fake, eps, objective, penalty)
    ours = recorded(critic, objective=objective, penalty=penalty)(real, fake, eps=eps).loss
    wanted = gradients(exact, wide)
    errors = []
    for loss in (eager, ours):
        pairs = zip(gradients(loss, critic), wanted, strict=True)
        errors.append(torch.stack([(a - b).norm() for a, b in pairs]).norm())
    scale = torch.stack([g.norm() for g in wanted]).norm()
    assert errors[1] <= 4 * errors[0] + 2e-6 * scale


# --- where it must step aside -----------------------------------------------------------------------------------------


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


ASIDE = {
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
@pytest.mark.parametrize("name", ASIDE)
def test_steps_aside_with_the_same_numbers_for(name: str, penalty: str) -> None:
    critic = ASIDE[name]().double()
    real, fake, eps = batch(8, 6)
    exact = plain_loss(critic, real, fake, eps, "gan", penalty)
    wanted = gradients(exact, critic)
    loss = gpk.CriticLoss(critic, objective="gan", penalty=penalty)
    for _ in range(2):
        ours = loss(real, fake, eps=eps).loss
        torch.testing.assert_close(ours, exact)
        assert_same(gradients(ours, critic), wanted)
    with pytest.raises(NoRule):
        loss._recorded(real, fake, eps)


def test_an_attempt_that_is_refused_gives_its_random_numbers_back() -> None:
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


@pytest.mark.usefixtures("_passes")
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


@pytest.mark.usefixtures("_passes")
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
    on_fake, again, on_real = torch.cat(noisy.drawn).split(5)
    noisy.fixed = [on_real, on_fake, on_real, again]
    exact = gpk.CriticLoss(noisy, penalty="r1", consistency_weight=2.0)._composed(real, fake, eps)
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
