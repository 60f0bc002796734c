from __future__ import annotations

import math

import pytest
import torch

from gptrainer.data import DATASETS, MIXTURES, POINTS
from gptrainer.data.points import swiss_roll


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", POINTS)
def test_every_distribution_gives_points_of_its_shape_and_repeats_from_a_seed(name: str) -> None:
    points = POINTS[name](50, generator())
    assert points.shape == (50, *DATASETS[name].shape)
    assert points.dtype == torch.float32
    assert torch.equal(points, POINTS[name](50, generator()))


@pytest.mark.parametrize("name", [name for name in POINTS if name != "dirac"])
def test_two_batches_of_a_generator_differ(name: str) -> None:
    draws = generator()
    assert not torch.equal(POINTS[name](50, draws), POINTS[name](50, draws))


@pytest.mark.parametrize(
    ("name", "modes", "sigma"), [("8gaussians", 8, 0.02 / 1.414), ("25gaussians", 25, 0.05 / 2.828), ("ring", 8, 0.01)]
)
def test_mixtures_have_the_published_modes_and_spread(name: str, modes: int, sigma: float) -> None:
    mixture = MIXTURES[name]
    points = mixture.sample(20_000, generator())
    nearest = torch.cdist(points, mixture.centres).argmin(dim=1)
    assert nearest.bincount(minlength=modes).min() > 0.85 * 20_000 / modes
    assert len(mixture.centres) == modes
    assert (points - mixture.centres[nearest]).std().item() == pytest.approx(sigma, rel=0.02)


def test_the_grid_of_25_reaches_four_over_2_828_each_way() -> None:
    centres = MIXTURES["25gaussians"].centres
    axis = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0]) / 2.828
    expected = torch.stack([x.reshape(-1) for x in torch.meshgrid(axis, axis, indexing="ij")], dim=1)
    assert torch.allclose(centres, expected)


def test_the_ring_has_eight_distinct_modes_on_the_unit_circle() -> None:
    centres = MIXTURES["ring"].centres
    assert torch.allclose(centres.norm(dim=1), torch.ones(8))
    distances = torch.cdist(centres, centres) + 10 * torch.eye(8)
    assert torch.allclose(distances.min(dim=1).values, torch.tensor(2 * math.sin(math.pi / 8)), atol=1e-5)


def test_the_swiss_roll_is_a_spiral_of_one_and_a_half_turns() -> None:
    x, y = (7.5 * swiss_roll(5000, generator())).T  # the roll is at angle t at radius t, t from 1.5 pi to 4.5 pi
    radius = torch.hypot(x, y)
    assert radius.min().item() == pytest.approx(1.5 * math.pi, abs=1)
    assert radius.max().item() == pytest.approx(4.5 * math.pi, abs=1)
    off = torch.remainder(torch.atan2(y, x) - radius + math.pi, 2 * math.pi) - math.pi
    assert off.std().item() == pytest.approx(0.25, abs=0.02)  # the noise, from arm to arm it is 2 pi


def test_the_line_is_uniform_and_the_dirac_all_at_zero() -> None:
    x, u = POINTS["lines"](5000, generator()).T
    assert x.abs().max() == 0
    assert torch.allclose(u.sort().values, torch.linspace(0, 1, 5000), atol=0.03)
    assert POINTS["dirac"](7, generator()).tolist() == [[0.0]] * 7
