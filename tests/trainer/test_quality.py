from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gptrainer.data import DATASETS, POINTS, load_images
from gptrainer.data.readers import DEBIAN
from gptrainer.metrics import classifier
from gptrainer.metrics.classifier import classifier_of
from gptrainer.metrics.quality import build_quality
from gptrainer.models import build_models

CPU = torch.device("cpu")


class Replay(nn.Module):
    """A generator of known samples, a part at a time."""

    def __init__(self, samples: torch.Tensor) -> None:
        super().__init__()
        self.samples, self.at = samples, 0

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        self.at += len(latent)
        return self.samples[self.at - len(latent) : self.at]


@pytest.mark.parametrize("data", [name for name, data in DATASETS.items() if data.kind == "points"])
def test_real_points_measure_as_well_as_the_facts_say_and_a_new_generator_worse(data: str) -> None:
    quality = build_quality(data, 2, 0, CPU)
    real = quality.measure(Replay(POINTS[data](2500, torch.Generator().manual_seed(9))))
    generator, _ = build_models(data, 2, 16)
    worse = quality.measure(generator)
    assert quality.name in real
    assert real.keys() == worse.keys()
    assert real["wasserstein_1"] <= 2 * quality.facts["wasserstein_1_of_real_halves"]
    assert worse["wasserstein_1"] > 2 * quality.facts["wasserstein_1_of_real_halves"]
    if "modes" in quality.facts:
        assert real["modes_covered"] == quality.facts["modes"]
        assert real["share_within_4_sigma"] == pytest.approx(quality.facts["share_of_real_within_4_sigma"], abs=0.01)


def test_real_digits_have_a_small_distance_and_a_high_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "EPOCHS", 8)
    quality = build_quality("digits", 10, 0, CPU)
    images = load_images("digits").images
    real = quality.measure(Replay(torch.cat([images, images])[:2000]))
    noise = quality.measure(Replay(torch.rand(2000, 1, 8, 8)))
    assert real["frechet_distance"] < quality.facts["frechet_distance_of_real_halves"] < noise["frechet_distance"] / 5
    assert real["inception_score"] == pytest.approx(quality.facts["inception_score_of_real_images"], rel=0.02)
    assert real["inception_score"] > 8 > 2 * noise["inception_score"]


def test_the_measure_is_the_same_whatever_the_seed_of_a_run_but_for_its_latent_points() -> None:
    images = torch.rand(300, 1, 8, 8)
    one, other = (build_quality("digits", 10, seed, CPU) for seed in (0, 1))
    assert one.measure_images(images) == other.measure_images(images)
    assert not torch.equal(one.latent, other.latent)


def test_data_with_test_images_is_measured_against_those(write_idx: Callable[..., Path]) -> None:
    quality = build_quality("fashion-mnist", 10, 0, CPU, data_dir=write_idx())
    assert quality.facts["images_in_a_real_half"] == 10  # of 20 held out, not of 40 to train on


def test_images_without_labels_are_measured_by_how_far_they_are_turned(tmp_path: Path) -> None:
    from PIL import Image

    columns = torch.arange(32).repeat(32, 1)
    for i in range(60):
        shade = (columns * (4 + i % 3)).byte().numpy()  # from black at the left to bright at the right
        Image.fromarray(shade).save(tmp_path / f"{i:02}.png")
    quality = build_quality("folder32", 10, 0, CPU, data_dir=tmp_path)
    images = load_images("folder32", data_dir=tmp_path)
    assert images.labels is None
    turned = classifier._training_set(images)
    assert turned.labels is not None
    assert turned.labels[:5].tolist() == [0, 1, 2, 3, 0]
    assert torch.equal(turned[torch.tensor([5])], images[torch.tensor([5])].rot90(1, (2, 3)))
    assert quality.measure_images(images.images).keys() == {"frechet_distance"}


# --- the cache of classifiers ----------------------------------------------------------------------------------------


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """An empty cache, and a list that grows with each training."""
    done: list[int] = []
    train = classifier.train_classifier
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifier, "train_classifier", lambda data, seed: (done.append(1), train(data, seed))[1])
    return done


def cached(tmp_path: Path) -> Path:
    (path,) = tmp_path.rglob("*.pt")
    return path


def test_a_classifier_is_trained_once_and_then_read_bit_for_bit(trainings: list[int], tmp_path: Path) -> None:
    images = load_images("digits")
    trained = classifier_of("digits", images)
    state = torch.get_rng_state()
    read = classifier_of("digits", images)
    assert len(trainings) == 1
    assert cached(tmp_path).is_relative_to(tmp_path / "gpkernels" / "classifiers")
    assert (trained.features(images.images) == read.features(images.images)).all()
    assert trained.accuracy == read.accuracy
    assert not any(p.requires_grad for p in read.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_or_reading_leaves_the_global_generator_alone(trainings: list[int]) -> None:
    state = torch.get_rng_state()
    classifier_of("digits", load_images("digits"))
    assert len(trainings) == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["data", "settings"])
def test_other_data_and_other_settings_have_classifiers_of_their_own(
    change: str, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = load_images("digits")
    classifier_of("digits", images)
    if change == "data":
        images = images.subset(torch.arange(1500))
    else:
        monkeypatch.setattr(classifier, "EPOCHS", 1)
    classifier_of("digits", images)
    assert len(trainings) == 2


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_trained_anew_and_replaced(kept: float, trainings: list[int], tmp_path: Path) -> None:
    images = load_images("digits")
    classifier_of("digits", images)
    path = cached(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    classifier_of("digits", images)
    assert len(trainings) == 2
    assert len(path.read_bytes()) == len(whole)
    classifier_of("digits", images)
    assert len(trainings) == 2


def test_a_single_changed_bit_is_seen(trainings: list[int], tmp_path: Path) -> None:
    images = load_images("digits")
    classifier_of("digits", images)
    path = cached(tmp_path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    classifier_of("digits", images)
    assert len(trainings) == 2


def test_a_cache_that_cannot_be_written_costs_time_and_not_the_run(
    trainings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert classifier_of("digits", load_images("digits")).accuracy > 0.1
    assert "cannot be cached" in capsys.readouterr().err


def test_without_a_cache_folder_named_it_is_in_the_users_home(
    trainings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    classifier_of("digits", load_images("digits"))
    assert cached(tmp_path).is_relative_to(tmp_path / "home" / ".cache" / "gpkernels")


@pytest.mark.parametrize(("shape", "places"), [((1, 8, 8), 4), ((1, 28, 28), 7), ((3, 32, 32), 8), ((3, 64, 64), 8)])
def test_classifiers_see_images_of_every_size_at_no_more_than_8x8_places(shape: tuple[int, ...], places: int) -> None:
    untrained = classifier.Classifier(shape, 10)
    assert untrained.body[:-3](torch.zeros(2, *shape)).shape[1:] == (32, places, places)
    assert untrained(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"needs {DEBIAN}, of Debian's package dataset-fashion-mnist")
def test_the_classifier_of_clothes_learns_from_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "IMAGES_SHOWN", 8_000)
    train = load_images("fashion-mnist", limit=5000)
    assert classifier.train_classifier(train, seed=0).accuracy > 0.75
