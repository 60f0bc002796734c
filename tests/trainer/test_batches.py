from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpkernels.arguments import UserError
from gptrainer.data import ShuffledBatches, load_batches, load_images
from gptrainer.data.batches import Prefetched
from gptrainer.processes import Processes

CPU = torch.device("cpu")
Write = Callable[..., Path]


@pytest.fixture(params=["points", "digits", "dequantised", "folder"])
def load(request: pytest.FixtureRequest, write_cifar: Write, write_folder: Write) -> Callable[..., Any]:
    """``load_batches`` of one kind of data, given a batch size and a seed."""
    names = {"points": "swissroll", "digits": "digits", "dequantised": "cifar10", "folder": "folder32"}
    folders = {"dequantised": write_cifar, "folder": write_folder}
    kind = request.param
    where = {"data_dir": folders[kind]()} if kind in folders else {}
    return lambda size, seed, **options: load_batches(names[kind], size, seed, CPU, **where, **options)


def test_batches_go_on_from_their_state_bit_for_bit_wherever_they_stood(load: Callable[..., Any]) -> None:
    straight, halved = load(4, 5), load(4, 5)
    for _ in range(7):
        halved.next()
        straight.next()
    resumed = load(4, 99)
    resumed.next()
    resumed.load_state_dict(halved.state_dict())
    for _ in range(9):  # beyond an epoch of the small sets
        assert torch.equal(straight.next(), resumed.next())


def test_another_seed_gives_other_batches(load: Callable[..., Any]) -> None:
    assert not torch.equal(load(4, 5).next(), load(4, 6).next())


def test_shards_together_are_the_batch_of_one_process(load: Callable[..., Any]) -> None:
    whole = load(6, 5)
    shards = [load(6, 5, processes=Processes(rank, 3)) for rank in range(3)]
    for _ in range(5):
        joint, parts = whole.next(), [shard.next() for shard in shards]
        assert [len(part) for part in parts] == [2, 2, 2]
        for rank, part in enumerate(parts):
            assert torch.equal(part, joint[rank::3])


def test_a_state_of_other_data_is_refused() -> None:
    batches = ShuffledBatches(torch.arange(12), 4, seed=0)
    batches.next()
    with pytest.raises(ValueError, match="13 samples, got one of 12"):
        ShuffledBatches(torch.arange(13), 4, seed=0).load_state_dict(batches.state_dict())


class Counting:
    """Batches that say how many were made, and in which thread."""

    def __init__(self) -> None:
        self.made, self.thread = 0, ""

    def next(self) -> torch.Tensor:
        self.made += 1
        self.thread = threading.current_thread().name
        if self.made == 6:
            raise UserError("the sixth is broken")
        return torch.tensor([self.made])

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def test_batches_are_made_ahead_by_a_thread_while_the_state_is_that_of_the_last_one_given() -> None:
    source = Counting()
    batches = Prefetched(source, CPU)
    assert batches.state_dict() == {"made": 0}
    assert [batches.next().item() for _ in range(2)] == [1, 2]
    assert batches.state_dict() == {"made": 2}
    for ahead in batches.ahead:
        ahead.result()
    assert source.made == 4
    assert source.thread != threading.current_thread().name
    batches.load_state_dict({"made": 1})
    assert batches.next().item() == 2


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_wanted() -> None:
    batches = Prefetched(Counting(), CPU)
    assert [batches.next().item() for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="the sixth is broken"):
        batches.next()


def test_dequantisation_adds_uniform_noise_that_is_new_in_each_batch() -> None:
    batches = ShuffledBatches(torch.zeros(4, 1, 50, 50), 4, seed=0, noise=1 / 128)
    first, second = batches.next(), batches.next()
    assert not torch.equal(first, second)
    assert 0 <= first.min() < first.max() < 1 / 128
    assert first.mean().item() == pytest.approx(1 / 256, rel=0.03)
    assert first.std().item() == pytest.approx(1 / 128 / 12**0.5, rel=0.03)


@pytest.mark.parametrize(("data", "limit"), [("8gaussians", 100), ("digits", 0), ("digits", 1798)])
def test_a_limit_that_cannot_be_is_refused(data: str, limit: int) -> None:
    with pytest.raises(UserError, match=f"--limit: expected .*, got {limit}"):
        load_batches(data, 4, 0, CPU, limit=limit)


def test_a_limit_is_the_first_images_and_leaves_the_others_to_hold_out() -> None:
    def all_of(split: Any, limit: int, count: int) -> torch.Tensor:
        images = load_images("digits", split=split, limit=limit)
        assert len(images) == count
        return images.images.flatten(1).sum(dim=1).sort().values

    sums = load_images("digits").images.flatten(1).sum(dim=1)
    assert torch.equal(all_of("train", 1000, 1000), sums[:1000].sort().values)
    assert torch.equal(all_of("held-out", 1000, 797), sums[1000:].sort().values)
    with pytest.raises(UserError, match="--limit: expected fewer than all images"):
        load_images("digits", split="held-out")
