from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from gptrainer import plots
from gptrainer.algorithms.system import ESTIMATES
from gptrainer.data import DATASETS, POINTS
from gptrainer.metrics.quality import build_quality
from gptrainer.models import build_models, sample

CPU = torch.device("cpu")


def drawn(path: Path) -> tuple[int, int]:
    """The size of a picture that is not blank."""
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(maxcolors=10**6) or range(10**6)) > 20
        return image.size


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("data", [name for name, data in DATASETS.items() if data.kind == "points"])
def test_points_and_curves_of_every_distribution_are_drawn_without_a_warning(data: str, tmp_path: Path) -> None:
    generator, critic = build_models(data, 2, 16)
    quality = build_quality(data, 2, 0, CPU)
    points = sample(generator, torch.randn(60, 2))
    plot = plots.plot_points if points.shape[1] == 2 else plots.plot_line
    plot(tmp_path / "points.png", "points", points, POINTS[data](90, torch.Generator()), partial(sample, critic))
    drawn(tmp_path / "points.png")
    curve = {"step": [0.0, 1.0], **{name: [value, value / 2] for name, value in quality.measure(generator).items()}}
    critic_curve = {"step": [1.0, 2.0, 3.0], "wasserstein_estimate": [1.0, 3.0, 2.0], "gradient_norm": [1.0, 2.0, 1.5]}
    estimate = ESTIMATES["wgan"]
    plots.plot_curves(tmp_path / "curves.png", "curves", estimate, critic_curve, curve, quality.facts, 1.0)
    drawn(tmp_path / "curves.png")


def test_the_window_holds_all_real_points_with_room_and_is_square() -> None:
    (left, right), (bottom, top) = plots._window(POINTS["lines"](500, torch.Generator().manual_seed(0)))
    assert right - left == pytest.approx(top - bottom)
    assert left == pytest.approx(-right)
    assert bottom < -0.2 < 1.2 < top


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
@pytest.mark.parametrize("labelled", [True, False], ids=["by class", "in order"])
def test_images_of_every_shape_are_drawn_without_a_warning(
    shape: tuple[int, ...], labelled: bool, tmp_path: Path
) -> None:
    images = torch.rand(37, *shape)
    classes = (torch.zeros(37, dtype=torch.int64), torch.arange(37) % 4) if labelled else None
    plots.plot_images(tmp_path / "images.png", "images", images, images, classes)
    width, height = drawn(tmp_path / "images.png")
    assert width > height > 200


def test_a_grid_shows_the_chosen_images_in_their_places_and_colours() -> None:
    images = torch.zeros(3, 3, 64, 64)
    images[1, 0] = 1.0  # red
    images[2, 2] = 1.0  # blue
    picture = plots.image_grid(images, torch.tensor([[2, 1], [0, -1]]))
    assert picture.shape == (128, 128, 3)
    middles = [picture[i][j].round().tolist() for i in (32, 96) for j in (32, 96)]
    assert middles == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_rows_are_classes_and_gaps_where_one_has_too_few() -> None:
    chosen = plots._by_class(torch.tensor([2, 0, 2, 2]), last=3)
    assert chosen.shape == (4, 10)
    assert chosen[0, :2].tolist() == [1, -1]
    assert chosen[2, :4].tolist() == [0, 2, 3, -1]
    assert chosen[[1, 3]].unique().tolist() == [-1]
