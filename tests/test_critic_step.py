"""The critic step gives PyTorch's numbers, for critics of every kind."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpkernels as gpk
from comparing import PENALTIES, assert_same, batch, gradients, recorded
from critics import (
    ACTIVATIONS,
    NORMS,
    PIECEWISE,
    Featured,
    MaxPooled,
    Noisy,
    ResidualCritic,
    SkipField,
    dcgan,
    mlp,
    plain_loss,
    plain_penalty,
    plain_points,
)
from gpkernels.critic import step
from gpkernels.critic.parts import Norm, Task


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


def test_whole_loss_of_an_odd_critic() -> None:
    critic = Odd().double()
    real, fake, eps = batch(4, 6)
    for penalty in PENALTIES:
        exact = plain_loss(critic, real, fake, eps, "gan", penalty)
        loss = recorded(critic, objective="gan", penalty=penalty)(real, fake, eps=eps).loss
        torch.testing.assert_close(loss, exact)
        assert_same(gradients(loss, critic), gradients(exact, critic))


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
        rows = {"wgan-gp": ("fake", "real", "again", "points"), "r1": ("fake", "real", "again")}[penalty]
        draws = dict(zip(rows, noisy.drawn, strict=True))
        noisy.fixed = [draws["real"], draws["fake"], draws.get("points", draws["real"]), draws["again"]]
        with gpk.fast_double_backward():
            exact = gpk.CriticLoss(noisy, penalty=penalty, **options)(real, fake, eps=eps)
        noisy.fixed, noisy.drawn = [], []
        for a, b in zip(parts, exact, strict=True):
            torch.testing.assert_close(a, b)
        assert parts.consistency > 0
        assert_same(gradients(parts.loss, noisy), gradients(exact.loss, noisy))


def test_dropout_keeps_one_mask_through_all_passes() -> None:
    critic = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 1)
    )
    critic = critic.double()
    points = torch.randn(5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    exact = plain_penalty(critic, points, 0.1)
    torch.manual_seed(1)
    task = Task(None, (("points", Norm(0.1)),), None, True)
    ours = step.penalty_on_gradient(critic, points, task)
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
