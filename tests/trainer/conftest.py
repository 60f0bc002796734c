from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptrainer import comparison, loop
from gptrainer.config import TrainConfig
from gptrainer.metrics import classifier


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a run has by default; the count is put back, since a run sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for every test but the one on the classifier itself."""
    monkeypatch.setattr(classifier, "EPOCHS", 2)
    monkeypatch.setattr(comparison, "ROUNDS", 2)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user's cache folder is to the tests: classifiers are trained once for all of them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


class NoQuality:
    """Measures nothing, fast."""

    name = "nothing"
    facts: Mapping[str, float] = {}

    def measure(self, generator: nn.Module) -> dict[str, float]:
        return {}


@pytest.fixture
def no_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which nothing depends on what samples are worth."""
    monkeypatch.setattr(loop, "build_quality", lambda *_, **__: NoQuality())


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A complete config of a run that takes a moment, with any values replaced."""

    def config(**values: Any) -> TrainConfig:
        small = {
            "algorithm": "wgan-gp",
            "data": "8gaussians",
            "steps": 4,
            "batch_size": 16,
            "width": 8,
            "n_critic": 2,
            "log_every": 1,
            "eval_every": 2,
            "out": tmp_path / "run",
        }
        return TrainConfig(**{**small, **values}).complete()

    return config
