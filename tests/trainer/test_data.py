from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from gpkernels.arguments import UserError
from gptrainer.data import MIXTURES, ShuffledBatches, load_batches, load_images
from gptrainer.metrics import classifier

EIGHT = MIXTURES["8gaussians"]


def test_eight_gaussians_stand_on_a_ring_of_radius_two_over_1_414() -> None:
    centres = EIGHT.centres
    assert torch.allclose(centres.norm(dim=1), torch.tensor(2 / 1.414))
    angles = torch.atan2(centres[:, 1], centres[:, 0]).remainder(2 * math.pi).sort().values
    assert torch.allclose(angles.diff(), torch.tensor(math.pi / 4), atol=1e-5)


def test_samples_of_eight_gaussians_have_the_published_spread_and_use_all_modes() -> None:
    points = EIGHT.sample(20_000, torch.Generator().manual_seed(3))
    distance = torch.cdist(points, EIGHT.centres)
    nearest = distance.argmin(dim=1)
    offsets = points - EIGHT.centres[nearest]
    assert offsets.std().item() == pytest.approx(0.02 / 1.414, rel=0.02)
    assert min(Counter(nearest.tolist()).values()) > 2_300


def test_digits_are_real_images_in_the_unit_interval() -> None:
    digits = load_images("digits")
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    assert digits.labels.unique().tolist() == list(range(10))


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    batches = ShuffledBatches(torch.arange(12), 4, seed=0)
    first, second = (torch.cat([batches.next() for _ in range(3)]) for _ in range(2))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(12))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("data", ["digits", "8gaussians"])
def test_batches_repeat_from_a_seed_and_go_on_from_their_state(data: str) -> None:
    device = torch.device("cpu")
    one, same, other = (load_batches(data, 64, seed, device) for seed in (5, 5, 6))
    assert torch.equal(one.next(), same.next())
    assert not torch.equal(one.next(), other.next())
    state = one.state_dict()
    other.load_state_dict(state)
    for _ in range(30):  # beyond an epoch of the digits
        assert torch.equal(one.next(), other.next())


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="--batch-size"):
        ShuffledBatches(torch.arange(12), 13, seed=0)


def test_the_classifier_reads_held_out_digits_and_leaves_the_global_generator_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(classifier, "EPOCHS", 8)
    before = torch.get_rng_state()
    trained = classifier.train_classifier(load_images("digits"), seed=1)
    assert trained.accuracy > 0.93
    assert torch.equal(torch.get_rng_state(), before)
    assert trained.features(load_images("digits").images[:5]).shape == (5, 32)
