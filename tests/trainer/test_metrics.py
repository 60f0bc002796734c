from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from gptrainer.data import MIXTURES
from gptrainer.metrics import Moments, frechet_distance, mean_gradient_norm, mode_coverage

EIGHT = MIXTURES["8gaussians"]


def test_frechet_distance_of_identical_sets_is_zero() -> None:
    features = np.random.default_rng(0).normal(size=(500, 12))
    assert frechet_distance(Moments.of(features), Moments.of(features)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(500, 3))
    shift = np.array([1.0, -2.0, 0.5])
    assert frechet_distance(Moments.of(features), Moments.of(features + shift)) == pytest.approx(5.25)


def test_frechet_distance_of_gaussians_on_common_axes_is_the_closed_form() -> None:
    a, b = np.array([4.0, 1.0, 0.0]), np.array([9.0, 0.25, 1.0])
    mean = np.array([1.0, 0.0, 3.0])
    expected = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(Moments(mean, np.diag(a)), Moments(0 * mean, np.diag(b))) == pytest.approx(expected)


def test_frechet_distance_agrees_with_a_general_matrix_root() -> None:
    random = np.random.default_rng(1)
    a, b = (Moments.of(random.normal(size=(200, 6)) @ random.normal(size=(6, 6))) for _ in range(2))
    root = linalg.sqrtm(a.covariance @ b.covariance)
    offset = a.mean - b.mean
    expected = offset @ offset + np.trace(a.covariance + b.covariance - 2 * root.real)
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
