"""CriticLoss compared with the sum of the usual parts in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from idioms import (
    SIMPLE,
    N,
    WithFeatures,
    assert_equal,
    gradients_of,
    make,
    mlp,
    plain_gradient_penalty,
    plain_zero_centred,
    scores_of,
)

ADVERSARIAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wgan": lambda real, fake: fake.mean() - real.mean(),
    "gan": lambda real, fake: nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean(),
}
PENALTIES: dict[str, Callable[..., Tensor]] = {
    "none": lambda critic, real, fake, eps: real.new_zeros(()),
    "wgan-gp": plain_gradient_penalty,
    "r1": lambda critic, real, fake, eps: plain_zero_centred(critic, real),
    "r2": lambda critic, real, fake, eps: plain_zero_centred(critic, fake),
}


@pytest.mark.parametrize("name", SIMPLE[:-1])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("objective", ADVERSARIAL)
def test_critic_loss_is_the_sum_of_the_usual_parts(objective: str, penalty: str, name: str, backend: str) -> None:
    critic, real, fake, eps = make(name)
    parts = gpk.CriticLoss(critic, objective=objective, penalty=penalty, penalty_weight=3.0)(real, fake, eps=eps)
    adversarial = ADVERSARIAL[objective](scores_of(critic(real)), scores_of(critic(fake)))
    expected = PENALTIES[penalty](critic, real, fake, eps)
    assert_equal(parts.loss, adversarial + 3.0 * expected, critic)
    torch.testing.assert_close(parts.adversarial, adversarial.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.penalty, expected.detach(), rtol=1e-10, atol=1e-12, check_dtype=False)
    assert parts.consistency == 0
    assert [part.requires_grad for part in parts] == [True, False, False, False]


def test_critic_loss_passes_target_and_side_on(backend: str) -> None:
    critic, real, fake, eps = make("an MLP with scores (N, 1)")
    options = {"target": 0.2, "one_sided": True}
    parts = gpk.CriticLoss(critic, **options)(real, fake, eps=eps)
    expected = plain_gradient_penalty(critic, real, fake, eps, **options)
    torch.testing.assert_close(parts.penalty, expected.detach())
    torch.testing.assert_close(parts.loss, parts.adversarial + 10 * expected)


def test_critic_loss_with_dragan_repeats_with_the_seed(backend: str) -> None:
    critic, real, fake, _ = make("an MLP with scores (N, 1)")
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
    critic, real, fake, eps = make("an MLP with scores (N, 1)")
    loss = gpk.CriticLoss(critic)
    assert torch.equal(loss(real, fake, eps=eps).loss, loss(real, fake, eps=eps).loss)
    assert not torch.equal(loss(real, fake).loss, loss(real, fake).loss)


def test_the_adversarial_gradient_reaches_the_generator_no_more_than_in_pytorch(backend: str) -> None:
    """Whatever a critic step does with fake's graph, its own weights' gradients are those of the detached batch."""
    critic, real, fake, eps = make("an MLP with scores (N, 1)")
    attached = fake.clone().requires_grad_()
    loss = gpk.CriticLoss(critic)
    expected = gradients_of(loss(real, fake, eps=eps).loss, critic)
    for a, b in zip(gradients_of(loss(real, attached * 1.0, eps=eps).loss, critic), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_state_dict_is_the_critic_under_its_name() -> None:
    critic = mlp()
    loss = gpk.CriticLoss(critic)
    assert set(loss.state_dict()) == {f"critic.{key}" for key in critic.state_dict()}
    other = gpk.CriticLoss(mlp())
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.critic[0].weight, critic[0].weight)
    assert "wgan-gp" in repr(loss)


def test_critic_loss_refuses_bad_batches(backend: str) -> None:
    loss, real = gpk.CriticLoss(mlp()), torch.randn(N, 6)
    with pytest.raises(ValueError, match=r"fake.*5, 6.*4, 6"):
        loss(real, real[:4])
    with pytest.raises(ValueError, match=r"eps.*per sample"):
        loss(real, real, eps=torch.rand(1))
    with pytest.raises(TypeError, match="critic"):
        gpk.CriticLoss(3)
