"""Penalties compared with idioms of plain PyTorch: values and every weight gradient."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from idioms import (
    CRITICS,
    SIMPLE,
    N,
    assert_equal,
    gradients_of,
    input_gradient,
    make,
    mlp,
    plain_gradient_penalty,
    plain_zero_centred,
)


@pytest.mark.parametrize("name", CRITICS)
def test_gradient_penalty_is_the_usual_one(name: str, backend: str) -> None:
    critic, real, fake, eps = make(name)
    _, _, args, kwargs = CRITICS[name]
    for options in ({}, {"target": 0.7}, {"one_sided": True, "target": 0.01}, {"target": 0.0}):
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps, critic_args=args, critic_kwargs=kwargs, **options)
        assert_equal(ours, plain_gradient_penalty(critic, real, fake, eps, *args, **options, **kwargs), critic)


@pytest.mark.parametrize("name", SIMPLE)
def test_r1_and_r2_are_the_usual_ones(name: str, backend: str) -> None:
    critic, real, fake, _ = make(name)
    assert_equal(gpk.r1_penalty(critic, real), plain_zero_centred(critic, real), critic)
    assert_equal(gpk.r2_penalty(critic, fake), plain_zero_centred(critic, fake), critic)


@pytest.mark.parametrize("name", ["an MLP with scores (N, 1)", "a convolutional critic"])
def test_dragan_is_the_usual_one_at_its_points(name: str, backend: str) -> None:
    critic, real, _, _ = make(name)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return critic(x)

    ours = gpk.dragan_penalty(watched, real, target=0.8, scale=0.25)
    share = (seen[0] - real) / (0.25 * real.std())
    assert ((share >= 0) & (share < 1)).all()
    plain = ((input_gradient(critic, seen[0]).norm(2, dim=1) - 0.8) ** 2).mean()
    assert_equal(ours, plain, critic)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (3,)], ids=str)
def test_eikonal_loss_is_the_usual_one_for_points_of_any_rank(shape: tuple[int, ...], backend: str) -> None:
    field = nn.Sequential(nn.Linear(3, 16), nn.Softplus(beta=100), nn.Linear(16, 1)).double()
    points = torch.randn(shape, dtype=torch.float64)
    x = points.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    assert_equal(gpk.eikonal_loss(field, points), ((gradients.norm(dim=-1) - 1) ** 2).mean(), field)


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
    critic, real, fake, eps = make("a convolutional critic")
    flat, column = (gpk.gradient_penalty(critic, real, fake, eps=e) for e in (eps, eps.reshape(-1, 1, 1, 1)))
    assert torch.equal(flat, column)


# --- what is not a tidy critic ----------------------------------------------------------------------------------------


def test_batch_norm_works_as_in_pytorch_and_warns_once(backend: str) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()
    real, fake = (torch.randn(N, 6, dtype=torch.float64) for _ in range(2))
    eps = torch.rand(N, dtype=torch.float64)
    with pytest.warns(UserWarning, match="BatchNorm.*mixes samples"):
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
    assert_equal(ours, plain_gradient_penalty(critic, real, fake, eps), critic)
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
    argument = "field" if name == "eikonal_loss" else "critic"
    with pytest.raises(TypeError, match=f"{argument}: .*int"):
        call(3)
    with pytest.raises(TypeError, match=f"{argument}.*scores.*str"):
        call(lambda x: "score")
    with pytest.raises(ValueError, match=f"{argument}.*depend on the input"):
        call(lambda x: (weight * 2).expand(len(x)))
    with pytest.raises(ValueError, match=f"{argument}.*depend on the input"):
        call(lambda x: torch.ones(len(x)))
    with pytest.raises(ValueError, match=f"{argument}.*depend on the input"):
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
    critic = mlp()
    torch.manual_seed(1)
    expected = _calls()[name](critic)
    torch.manual_seed(1)
    with torch.no_grad():
        value = _calls()[name](critic)
    assert not value.requires_grad
    assert expected.requires_grad
    torch.testing.assert_close(value, expected.detach())


def test_inputs_are_not_touched_and_the_generator_gets_no_gradient(backend: str) -> None:
    generator, critic = nn.Linear(4, 6), mlp()
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
    critic = mlp()
    gpk.gradient_penalty(critic, torch.randn(N, 6), torch.randn(N, 6))
    assert all(p.grad is None for p in critic.parameters())


def test_frozen_weights_are_left_out(backend: str) -> None:
    critic, real, fake, eps = make("an MLP with scores (N, 1)")
    whole = gradients_of(gpk.gradient_penalty(critic, real, fake, eps=eps), critic)
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


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["an MLP with scores (N, 1)", "a convolutional critic", "a critic with LayerNorm"])
def test_autocast_gives_a_float32_penalty_and_finite_gradients(name: str, backend: str) -> None:
    critic, real, fake, eps = make(name)
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


FIELDS: dict[str, Any] = {
    "no callable": 3,
    "no tensor": lambda x: None,
    "distances that do not depend on the points": lambda x: torch.ones(len(x), 1, requires_grad=True),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("what", FIELDS)
def test_a_mistake_in_a_field_names_the_field(what: str, reduction: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^field: expected"):
        gpk.eikonal_loss(FIELDS[what], torch.randn(4, 3), reduction=reduction)


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
    with pytest.raises(TypeError, match="critic_args: expected a tuple or list"):
        call(critic, x, critic_args=args)
    with pytest.raises(TypeError, match="critic_kwargs: expected a mapping of names to values, got list"):
        call(critic, x, critic_kwargs=[1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", OF_A_CRITIC)
def test_samples_are_not_nested(name: str) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    with pytest.raises(TypeError, match=r"expected a dense floating-point tensor, got torch\.float32, nested"):
        OF_A_CRITIC[name](nn.Linear(6, 1), nested)
