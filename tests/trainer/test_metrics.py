from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from gptrainer.data import MIXTURES
from gptrainer.metrics.distances import (
    frechet_distance,
    gradient_norms,
    inception_score,
    mean_gradient_norm,
    mode_coverage,
    moments,
    wasserstein_1,
)
from gptrainer.reproduce.experiments.layer_gradients import layer_gradient_norms, share_at_bound, weight_histogram

EIGHT = MIXTURES["8gaussians"]


def test_frechet_distance_of_identical_sets_is_zero() -> None:
    features = np.random.default_rng(0).normal(size=(500, 12))
    assert frechet_distance(moments(features), moments(features)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(500, 3))
    shift = np.array([1.0, -2.0, 0.5])
    assert frechet_distance(moments(features), moments(features + shift)) == pytest.approx(5.25)


def test_frechet_distance_of_gaussians_on_common_axes_is_the_closed_form() -> None:
    a, b = np.array([4.0, 1.0, 0.0]), np.array([9.0, 0.25, 1.0])
    mean = np.array([1.0, 0.0, 3.0])
    expected = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance((mean, np.diag(a)), (0 * mean, np.diag(b))) == pytest.approx(expected)


def test_frechet_distance_agrees_with_a_general_matrix_root() -> None:
    random = np.random.default_rng(1)
    a, b = (moments(random.normal(size=(200, 6)) @ random.normal(size=(6, 6))) for _ in range(2))
    root = linalg.sqrtm(a[1] @ b[1])
    offset = a[0] - b[0]
    expected = offset @ offset + np.trace(a[1] + b[1] - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_real_points_lie_within_four_sigma_of_all_eight_modes() -> None:
    share, modes = mode_coverage(EIGHT.sample(2500, torch.Generator().manual_seed(0)), EIGHT)
    assert share > 0.99  # exp(-8) of a Gaussian in the plane lies outside
    assert modes == 8


def test_points_on_one_mode_cover_one_and_points_elsewhere_none() -> None:
    centre = EIGHT.centres[2]
    assert mode_coverage(centre.expand(100, 2), EIGHT) == (1.0, 1)
    assert mode_coverage((centre + 5 * EIGHT.sigma).expand(100, 2), EIGHT) == (0.0, 0)


def test_the_gradient_norm_of_a_linear_critic_is_the_norm_of_its_weights() -> None:
    critic = nn.Linear(2, 1)
    critic.weight.data = torch.tensor([[3.0, 4.0]])
    points = torch.randn(10, 2), torch.randn(10, 2)
    assert mean_gradient_norm(critic, *points, torch.Generator()) == pytest.approx(5)


# --- Inception score -------------------------------------------------------------------------------------------------


def test_the_inception_score_of_sure_and_even_guesses_is_the_number_of_classes() -> None:
    assert inception_score(1000 * torch.eye(7).repeat(5, 1)) == pytest.approx(7)


@pytest.mark.parametrize("logits", [torch.zeros(20, 7), 1000 * torch.eye(7)[[3] * 20]], ids=["unsure", "all the same"])
def test_the_inception_score_of_what_is_unsure_or_all_the_same_is_one(logits: torch.Tensor) -> None:
    assert inception_score(logits) == pytest.approx(1)


def test_the_inception_score_is_the_exponential_of_mutual_information() -> None:
    logits = torch.randn(50, 4, dtype=torch.float64)
    p = logits.softmax(dim=1).numpy()
    expected = np.exp(np.mean([np.sum(row * np.log(row / p.mean(axis=0))) for row in p]))
    assert inception_score(logits) == pytest.approx(expected)


# --- transport -------------------------------------------------------------------------------------------------------


def test_the_distance_of_a_shifted_sample_is_the_shift() -> None:
    points = torch.randn(200, 2)
    assert wasserstein_1(points, points) == pytest.approx(0, abs=1e-12)
    assert wasserstein_1(points[torch.randperm(200)] + torch.tensor([3.0, -4.0]), points) == pytest.approx(5, rel=1e-5)


def test_the_distance_is_the_least_over_all_assignments() -> None:
    a, b = torch.randn(6, 2), torch.randn(6, 2)
    costs = torch.cdist(a.double(), b.double()).numpy()
    best = min(costs[range(6), order].mean() for order in map(list, permutations(range(6))))
    assert wasserstein_1(a, b) == pytest.approx(best)


def test_the_distance_in_one_dimension_is_that_of_sorted_points_and_sizes_may_differ() -> None:
    a = torch.randn(300, 1)
    b = torch.randn(300, 1) + 0.3
    expected = (a.sort(dim=0).values - b.sort(dim=0).values).abs().mean().item()
    assert wasserstein_1(a, b) == pytest.approx(expected, rel=1e-5)
    assert wasserstein_1(a, b.repeat(2, 1)) == pytest.approx(expected, rel=1e-5)


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_real_points_of_every_mixture_cover_all_of_its_modes(name: str) -> None:
    mixture = MIXTURES[name]
    share, modes = mode_coverage(mixture.sample(2500, torch.Generator().manual_seed(0)), mixture)
    assert share > 0.99
    assert modes == len(mixture.centres)
    few = mixture.centres[[0, 3, 5]].repeat(30, 1)
    assert mode_coverage(few, mixture) == (1.0, 3)


# --- gradients and weights -------------------------------------------------------------------------------------------


def test_gradient_norms_are_one_for_each_point() -> None:
    points = torch.randn(9, 2)

    def half_square(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(dim=1) / 2

    assert torch.allclose(gradient_norms(half_square, points), points.norm(dim=1))


def test_layer_gradient_norms_are_those_of_the_critics_loss_at_each_output() -> None:
    critic = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
    real, fake = torch.randn(8, 2), torch.randn(8, 2)
    first, last = layer_gradient_norms(critic, real, fake).tolist()
    assert last == pytest.approx(np.sqrt(16) / 8)  # each score's weight in the two means is 1/8
    slopes = (critic[0](torch.cat([real, fake])) > 0) * critic[2].weight / 8
    assert first == pytest.approx(slopes.norm().item())
    assert not critic[0]._forward_hooks


def test_the_histogram_counts_matrices_and_not_biases() -> None:
    critic = nn.Linear(4, 1)
    critic.weight.data = torch.tensor([[-0.01, 0.01, 0.01, 0.0]])
    critic.bias.data.fill_(5)
    shares, edges = weight_histogram(critic, bins=5, bound=0.01)
    assert shares.tolist() == [0.25, 0, 0.25, 0, 0.5]
    assert (edges[0].item(), edges[-1].item()) == pytest.approx((-0.01, 0.01))
    assert share_at_bound(critic, 0.01) == 0.75
    assert weight_histogram(nn.Linear(50, 50))[0].sum().item() == pytest.approx(1)
