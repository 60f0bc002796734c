"""Penalties and CriticLoss compared with idioms of plain PyTorch: values and every weight gradient."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk

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


def _mlp(*tail: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 1), *tail)


def _conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 6, 3, 2, 1), nn.LeakyReLU(0.2))


VECTOR, IMAGE, N = (6,), (2, 8, 8), 5
LABELS, VECTORS = torch.tensor([0, 3, 1, 1, 2]), torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)
# name: how to make the critic, the shape of a sample, further positional and named inputs
CRITICS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "an MLP with scores (N, 1)": (_mlp, VECTOR, (), {}),
    "an MLP with scores (N,)": (lambda: _mlp(nn.Flatten(0)), VECTOR, (), {}),
    "a convolutional critic": (lambda: nn.Sequential(_conv(), nn.Flatten(), nn.Linear(24, 1)), IMAGE, (), {}),
    "a critic with a score map": (lambda: nn.Sequential(_conv(), nn.Conv2d(6, 1, 1)), IMAGE, (), {}),
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


def _make(name: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The critic in float64, a real and a fake batch, and eps."""
    build, shape, _, _ = CRITICS[name]
    critic = build().double()
    real, fake = (torch.randn(N, *shape, dtype=torch.float64) for _ in range(2))
    return critic, real, 2 * fake + 0.5, torch.rand(N, dtype=torch.float64)


# --- the idioms -------------------------------------------------------------------------------------------------------


def _scores(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _input_gradient(critic: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    x = x.detach().clone().requires_grad_(True)
    scores = _scores(critic(x, *args, **kwargs))
    ones = torch.ones_like(scores)
    (gradients,) = torch.autograd.grad(scores, x, grad_outputs=ones, create_graph=True, retain_graph=True)
    return gradients.reshape(x.shape[0], -1)


def _plain_gradient_penalty(
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
    gradients = _input_gradient(critic, alpha * real + (1 - alpha) * fake, *args, **kw)
    gap = gradients.norm(2, dim=1) - target
    return ((gap.clamp(min=0) if one_sided else gap) ** 2).mean()


def _plain_zero_centred(critic: Any, x: Tensor) -> Tensor:
    return _input_gradient(critic, x).square().sum(1).mean()


def _gradients(value: Tensor, critic: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(critic.parameters()), allow_unused=True))


def _assert_equal(ours: Tensor, plain: Tensor, critic: Any) -> None:
    """Equal values and equal gradients; a weight that the penalty does not reach may have none or zeros."""
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    assert ours.requires_grad
    reached = 0
    for a, b in zip(_gradients(ours, critic), _gradients(plain, critic), strict=True):
        if b is None or a is None:
            assert all(g is None or not g.any() for g in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            reached += int(b.any())
    assert reached > 0


@pytest.mark.parametrize("name", CRITICS)
def test_gradient_penalty_is_the_usual_one(name: str, backend: str) -> None:
    critic, real, fake, eps = _make(name)
    _, _, args, kwargs = CRITICS[name]
    for options in ({}, {"target": 0.7}, {"one_sided": True, "target": 0.01}, {"target": 0.0}):
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps, critic_args=args, critic_kwargs=kwargs, **options)
        _assert_equal(ours, _plain_gradient_penalty(critic, real, fake, eps, *args, **options, **kwargs), critic)


@pytest.mark.parametrize("name", SIMPLE)
def test_r1_and_r2_are_the_usual_ones(name: str, backend: str) -> None:
    critic, real, fake, _ = _make(name)
    _assert_equal(gpk.r1_penalty(critic, real), _plain_zero_centred(critic, real), critic)
    _assert_equal(gpk.r2_penalty(critic, fake), _plain_zero_centred(critic, fake), critic)


@pytest.mark.parametrize("name", ["an MLP with scores (N, 1)", "a convolutional critic"])
def test_dragan_is_the_usual_one_at_its_points(name: str, backend: str) -> None:
    critic, real, _, _ = _make(name)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return critic(x)

    ours = gpk.dragan_penalty(watched, real, target=0.8, scale=0.25)
    share = (seen[0] - real) / (0.25 * real.std())
    assert ((share >= 0) & (share < 1)).all()
    plain = ((_input_gradient(critic, seen[0]).norm(2, dim=1) - 0.8) ** 2).mean()
    _assert_equal(ours, plain, critic)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (3,)], ids=str)
def test_eikonal_loss_is_the_usual_one_for_points_of_any_rank(shape: tuple[int, ...], backend: str) -> None:
    field = nn.Sequential(nn.Linear(3, 16), nn.Softplus(beta=100), nn.Linear(16, 1)).double()
    points = torch.randn(shape, dtype=torch.float64)
    x = points.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    _assert_equal(gpk.eikonal_loss(field, points), ((gradients.norm(dim=-1) - 1) ** 2).mean(), field)


def test_the_norm_is_over_all_but_the_batch_and_eps_is_per_sample(backend: str) -> None:
    """Two frequent mistakes, by a critic whose gradient is known: |grad| = 2 * sqrt(elements of a sample)."""
    real, fake = torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4)
    expected = (2 * 32**0.5 - 1) ** 2
    assert gpk.gradient_penalty(lambda x: 2 * x.sum((1, 2, 3)), real, fake).item() == pytest.approx(expected, rel=1e-6)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.sum((1, 2, 3))

    gpk.gradient_penalty(watched, real, fake)
    shares = seen[0].flatten(1)
    assert (shares == shares[:, :1]).all()
    assert shares[:, 0].unique().numel() == 3


def test_eps_of_either_shape_gives_the_same(backend: str) -> None:
    critic, real, fake, eps = _make("a convolutional critic")
    flat, column = (gpk.gradient_penalty(critic, real, fake, eps=e) for e in (eps, eps.reshape(-1, 1, 1, 1)))
    assert torch.equal(flat, column)


# --- what is not a tidy critic ----------------------------------------------------------------------------------------


def test_batch_norm_works_as_in_pytorch_and_warns_once(backend: str) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()
    real, fake = (torch.randn(N, 6, dtype=torch.float64) for _ in range(2))
    eps = torch.rand(N, dtype=torch.float64)
    with pytest.warns(UserWarning, match="BatchNorm.*mixes samples"):
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
    _assert_equal(ours, _plain_gradient_penalty(critic, real, fake, eps), critic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpk.gradient_penalty(critic, real, fake, eps=eps)
        gpk.r1_penalty(critic, real)


def test_a_loss_of_a_critic_with_batch_norm_warns_where_it_is_called_once_with_the_cure() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    real, fake = torch.randn(N, 6), torch.randn(N, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpk.CriticLoss(critic, penalty="none")(real, fake)
    with pytest.warns(UserWarning, match="BatchNorm.*LayerNorm") as found:
        gpk.CriticLoss(critic)(real, fake)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpk.CriticLoss(critic)(real, fake)


def test_batch_norm_in_evaluation_mode_is_per_sample_and_does_not_warn(backend: str) -> None:
    critic = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpk.r1_penalty(critic, torch.randn(N, 6))


def _calls() -> dict[str, Callable[[Any], Tensor]]:
    x = torch.randn(N, 6)
    return {
        "gradient_penalty": lambda critic: gpk.gradient_penalty(critic, x, x + 1),
        "r1_penalty": lambda critic: gpk.r1_penalty(critic, x),
        "r2_penalty": lambda critic: gpk.r2_penalty(critic, x),
        "dragan_penalty": lambda critic: gpk.dragan_penalty(critic, x),
        "eikonal_loss": lambda critic: gpk.eikonal_loss(critic, x),
    }


@pytest.mark.parametrize("name", _calls())
def test_a_critic_that_is_none_is_refused(name: str, backend: str) -> None:
    call, weight = _calls()[name], torch.ones(1, requires_grad=True)
    with pytest.raises(TypeError, match=r"critic.*int"):
        call(3)
    with pytest.raises(TypeError, match=r"critic.*scores.*str"):
        call(lambda x: "score")
    with pytest.raises(ValueError, match=r"critic.*depend on the input"):
        call(lambda x: (weight * 2).expand(len(x)))
    with pytest.raises(ValueError, match=r"critic.*depend on the input"):
        call(lambda x: torch.ones(len(x)))
    with pytest.raises(ValueError, match=r"critic.*depend on the input"):
        call(lambda x: x.detach().sum(1))


def test_integer_and_empty_inputs_are_refused_before_the_critic_is_called(backend: str) -> None:
    def critic(x: Tensor) -> Tensor:
        raise AssertionError("called")

    whole, empty, good = torch.ones(3, 2, dtype=torch.int64), torch.empty(0, 2), torch.ones(3, 2)
    for bad, error in ((whole, TypeError), (empty, ValueError), ([1.0], TypeError)):
        for name, call in {
            "real": lambda bad=bad: gpk.gradient_penalty(critic, bad, good),
            "fake": lambda bad=bad: gpk.gradient_penalty(critic, good, bad),
            "real.*": lambda bad=bad: gpk.r1_penalty(critic, bad),
            "fake.*": lambda bad=bad: gpk.r2_penalty(critic, bad),
            "real.?": lambda bad=bad: gpk.dragan_penalty(critic, bad),
            "points": lambda bad=bad: gpk.eikonal_loss(critic, bad),
        }.items():
            with pytest.raises(error, match=f"^{name}"):
                call()
    with pytest.raises(ValueError, match=r"real.*spread"):
        gpk.dragan_penalty(critic, torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"scale.*-1"):
        gpk.dragan_penalty(critic, good, scale=-1.0)
    with pytest.raises(ValueError, match=r"target.*-1"):
        gpk.gradient_penalty(lambda x: x.sum(1), good, good, target=-1.0)


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _calls())
def test_no_grad_gives_the_value_without_a_graph(name: str, backend: str) -> None:
    critic = _mlp()
    torch.manual_seed(1)
    expected = _calls()[name](critic)
    torch.manual_seed(1)
    with torch.no_grad():
        value = _calls()[name](critic)
    assert not value.requires_grad
    assert expected.requires_grad
    torch.testing.assert_close(value, expected.detach())


def test_inputs_are_not_touched_and_the_generator_gets_no_gradient(backend: str) -> None:
    generator, critic = nn.Linear(4, 6), _mlp()
    real, fake = torch.randn(N, 6, requires_grad=True), generator(torch.randn(N, 4))
    copies = real.detach().clone(), fake.detach().clone()
    total = gpk.gradient_penalty(critic, real, fake) + gpk.r1_penalty(critic, real) + gpk.r2_penalty(critic, fake)
    (total + gpk.dragan_penalty(critic, real) + gpk.eikonal_loss(critic, real)).backward()
    assert real.grad is None
    assert all(p.grad is None for p in generator.parameters())
    assert critic[0].weight.grad is not None
    assert real.requires_grad
    assert torch.equal(real, copies[0])
    assert torch.equal(fake, copies[1])


def test_a_penalty_leaves_no_gradient_behind_until_backward(backend: str) -> None:
    critic = _mlp()
    gpk.gradient_penalty(critic, torch.randn(N, 6), torch.randn(N, 6))
    assert all(p.grad is None for p in critic.parameters())


def test_frozen_weights_are_left_out(backend: str) -> None:
    critic, real, fake, eps = _make("an MLP with scores (N, 1)")
    whole = _gradients(gpk.gradient_penalty(critic, real, fake, eps=eps), critic)
    critic[0].weight.requires_grad_(False)
    gpk.gradient_penalty(critic, real, fake, eps=eps).backward()
    assert critic[0].weight.grad is None
    torch.testing.assert_close(critic[2].weight.grad, whole[2])


def _resident_mib() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 2**20


def _live_tensors() -> int:
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("way", ["gradient_penalty", "CriticLoss"])
def test_a_thousand_calls_do_not_grow_memory(way: str, backend: str) -> None:
    """Graphs of 200 KiB of activations each, freed without the help of the cycle collector."""
    critic = nn.Sequential(nn.Linear(6, 96), nn.LeakyReLU(0.2), nn.Linear(96, 96), nn.LeakyReLU(0.2), nn.Linear(96, 1))
    real, fake = torch.randn(128, 6), torch.randn(128, 6)
    loss = gpk.CriticLoss(critic)

    def call() -> None:
        value = gpk.gradient_penalty(critic, real, fake) if way == "gradient_penalty" else loss(real, fake).loss
        critic.zero_grad()
        value.backward()

    torch.set_num_threads(1)
    for _ in range(100):
        call()
    gc.collect()
    gc.disable()
    try:
        tensors, before = _live_tensors(), _resident_mib()
        for _ in range(1000):
            call()
        assert _resident_mib() - before < 8
        assert _live_tensors() <= tensors
    finally:
        gc.enable()


# --- CriticLoss -------------------------------------------------------------------------------------------------------

ADVERSARIAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wgan": lambda real, fake: fake.mean() - real.mean(),
    "gan": lambda real, fake: nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean(),
}
PENALTIES: dict[str, Callable[..., Tensor]] = {
    "none": lambda critic, real, fake, eps: real.new_zeros(()),
    "wgan-gp": _plain_gradient_penalty,
    "r1": lambda critic, real, fake, eps: _plain_zero_centred(critic, real),
    "r2": lambda critic, real, fake, eps: _plain_zero_centred(critic, fake),
}


@pytest.mark.parametrize("name", SIMPLE[:-1])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("objective", ADVERSARIAL)
def test_critic_loss_is_the_sum_of_the_usual_parts(objective: str, penalty: str, name: str, backend: str) -> None:
    critic, real, fake, eps = _make(name)
    parts = gpk.CriticLoss(critic, objective=objective, penalty=penalty, penalty_weight=3.0)(real, fake, eps=eps)
    adversarial = ADVERSARIAL[objective](_scores(critic(real)), _scores(critic(fake)))
    expected = PENALTIES[penalty](critic, real, fake, eps)
    _assert_equal(parts.loss, adversarial + 3.0 * expected, critic)
    torch.testing.assert_close(parts.adversarial, adversarial.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.penalty, expected.detach(), rtol=1e-10, atol=1e-12, check_dtype=False)
    assert parts.consistency == 0
    assert [part.requires_grad for part in parts] == [True, False, False, False]


def test_critic_loss_passes_target_and_side_on(backend: str) -> None:
    critic, real, fake, eps = _make("an MLP with scores (N, 1)")
    options = {"target": 0.2, "one_sided": True}
    parts = gpk.CriticLoss(critic, **options)(real, fake, eps=eps)
    expected = _plain_gradient_penalty(critic, real, fake, eps, **options)
    torch.testing.assert_close(parts.penalty, expected.detach())
    torch.testing.assert_close(parts.loss, parts.adversarial + 10 * expected)


def test_critic_loss_with_dragan_repeats_with_the_seed(backend: str) -> None:
    critic, real, fake, _ = _make("an MLP with scores (N, 1)")
    loss = gpk.CriticLoss(critic, penalty="dragan", target=0.8, dragan_scale=0.25)
    torch.manual_seed(5)
    parts = loss(real, fake)
    torch.manual_seed(5)
    expected = gpk.dragan_penalty(critic, real, target=0.8, scale=0.25)
    torch.testing.assert_close(parts.penalty, expected.detach())


def test_consistency_compares_two_dropout_passes_over_the_real_batch(backend: str) -> None:
    critic = WithFeatures(dropout=0.5)
    real, fake = torch.randn(N, 6), torch.randn(N, 6)
    loss = gpk.CriticLoss(critic, consistency_weight=2.0)
    parts = loss(real, fake)
    assert parts.consistency > 0
    torch.testing.assert_close(parts.loss, parts.adversarial + 10 * parts.penalty + 2 * parts.consistency)
    critic.eval()
    # Both passes are halves of one product, whose rows may round differently.
    assert loss(real, fake).consistency < 1e-14


def test_consistency_sees_the_features_by_their_weight_and_the_margin_cuts_it(backend: str) -> None:
    critic = WithFeatures(dropout=0.5).double()
    real, fake = torch.randn(N, 6, dtype=torch.float64), torch.randn(N, 6, dtype=torch.float64)

    def consistency(**options: float) -> Tensor:
        torch.manual_seed(9)
        return gpk.CriticLoss(critic, penalty="none", consistency_weight=1.0, **options)(real, fake).consistency

    scores_only, tenth, whole = (consistency(feature_weight=w) for w in (0.0, 0.1, 1.0))
    assert scores_only < tenth < whole
    torch.testing.assert_close(tenth - scores_only, (whole - scores_only) / 10)
    assert consistency(consistency_margin=1e6) == 0


def test_a_fixed_eps_repeats_and_a_drawn_one_does_not(backend: str) -> None:
    critic, real, fake, eps = _make("an MLP with scores (N, 1)")
    loss = gpk.CriticLoss(critic)
    assert torch.equal(loss(real, fake, eps=eps).loss, loss(real, fake, eps=eps).loss)
    assert not torch.equal(loss(real, fake).loss, loss(real, fake).loss)


def test_the_adversarial_gradient_reaches_the_generator_no_more_than_in_pytorch(backend: str) -> None:
    """Whatever a critic step does with fake's graph, its own weights' gradients are those of the detached batch."""
    critic, real, fake, eps = _make("an MLP with scores (N, 1)")
    attached = fake.clone().requires_grad_()
    loss = gpk.CriticLoss(critic)
    expected = _gradients(loss(real, fake, eps=eps).loss, critic)
    for a, b in zip(_gradients(loss(real, attached * 1.0, eps=eps).loss, critic), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_state_dict_is_the_critic_under_its_name() -> None:
    critic = _mlp()
    loss = gpk.CriticLoss(critic)
    assert set(loss.state_dict()) == {f"critic.{key}" for key in critic.state_dict()}
    other = gpk.CriticLoss(_mlp())
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.critic[0].weight, critic[0].weight)
    assert "wgan-gp" in repr(loss)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a foreign objective": ({"objective": "ns"}, ValueError, "objective.*wgan.*'ns'"),
    "a foreign penalty": ({"penalty": "gp"}, ValueError, "penalty.*wgan-gp.*'gp'"),
    "a negative weight": ({"penalty_weight": -1.0}, ValueError, "penalty_weight.*-1"),
    "a text weight": ({"penalty_weight": "10"}, TypeError, "penalty_weight.*str"),
    "a negative target": ({"target": -1.0}, ValueError, "target.*-1"),
    "a negative scale": ({"dragan_scale": -1.0}, ValueError, "dragan_scale"),
    "a negative consistency weight": ({"consistency_weight": -1.0}, ValueError, "consistency_weight"),
    "a negative margin": ({"consistency_margin": -1.0}, ValueError, "consistency_margin"),
    "an infinite feature weight": ({"feature_weight": float("inf")}, ValueError, "feature_weight.*inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_of_critic_loss_are_validated(name: str) -> None:
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        gpk.CriticLoss(_mlp(), **options)


def test_critic_loss_refuses_bad_batches(backend: str) -> None:
    loss, real = gpk.CriticLoss(_mlp()), torch.randn(N, 6)
    with pytest.raises(ValueError, match=r"fake.*5, 6.*4, 6"):
        loss(real, real[:4])
    with pytest.raises(ValueError, match=r"eps.*per sample"):
        loss(real, real, eps=torch.rand(1))
    with pytest.raises(TypeError, match="critic"):
        gpk.CriticLoss(3)


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["an MLP with scores (N, 1)", "a convolutional critic", "a critic with LayerNorm"])
def test_autocast_gives_a_float32_penalty_and_finite_gradients(name: str, backend: str) -> None:
    critic, real, fake, eps = _make(name)
    critic, real, fake, eps = critic.float(), real.float(), fake.float(), eps.float()
    exact = gpk.gradient_penalty(critic, real, fake, eps=eps)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = gpk.gradient_penalty(critic, real, fake, eps=eps)
        parts = gpk.CriticLoss(critic)(real, fake, eps=eps)
    assert penalty.dtype == parts.loss.dtype == torch.float32
    torch.testing.assert_close(penalty, exact, rtol=0.1, atol=0.02)
    for value in (penalty, parts.loss):
        critic.zero_grad()
        value.backward()
        grads = [p.grad for p in critic.parameters() if p.grad is not None]
        assert grads
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("given", [3, nn.Linear], ids=["a number", "a class"])
def test_what_is_no_critic_is_refused_by_name(given: Any) -> None:
    x = torch.randn(4, 2)
    for call in (
        lambda: gpk.CriticLoss(given),
        lambda: gpk.r1_penalty(given, x),
        lambda: gpk.gradient_penalty(given, x, x),
    ):
        with pytest.raises(
            TypeError, match=r"critic: expected a module or a callable, got (int|the class Linear; const)"
        ):
            call()


# --- arguments of another type ----------------------------------------------------------------------------------------

OF_A_CRITIC: dict[str, Callable[..., Any]] = {
    "r1_penalty": gpk.r1_penalty,
    "gradient_penalty": lambda critic, x, **more: gpk.gradient_penalty(critic, x, x, **more),
    "input_gradient": gpk.input_gradient,
    "CriticLoss": lambda critic, x, **more: gpk.CriticLoss(critic)(x, x, **more),
}


@pytest.mark.parametrize("name", OF_A_CRITIC)
@pytest.mark.parametrize("args", [None, torch.ones(2, 2), "labels", 3], ids=["None", "a tensor", "a text", "a number"])
def test_further_arguments_are_a_sequence_and_a_mapping(args: object, name: str) -> None:
    call, critic, x = OF_A_CRITIC[name], nn.Linear(6, 1), torch.randn(5, 6)
    with pytest.raises(TypeError, match="critic_args: expected a tuple or list of arguments, got"):
        call(critic, x, critic_args=args)
    with pytest.raises(TypeError, match="critic_kwargs: expected a mapping of arguments by name, got list"):
        call(critic, x, critic_kwargs=[1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", OF_A_CRITIC)
def test_samples_are_not_nested(name: str) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    with pytest.raises(TypeError, match=r"expected a dense floating-point tensor, got torch\.float32, nested"):
        OF_A_CRITIC[name](nn.Linear(6, 1), nested)
