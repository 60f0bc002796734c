"""Cases of `gpkernels bench` for pytest-benchmark, with its tables, storage and comparison.

.venv/bin/python -m pytest bench [--whole] [-k "small and interpolate"] [--benchmark-autosave] [--benchmark-compare]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpkernels.bench import ops, steps
from gpkernels.bench.trial import EAGER, OURS, Trial
from gptrainer import benchmark as train

CPU = torch.device("cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = not metafunc.config.getoption("--whole")
    found = [trial for suite in (ops, steps, train) for trial in suite.trials(CPU, quick)]
    metafunc.parametrize("trial", found, ids=[f"{trial.suite}: {trial.case}" for trial in found])


@pytest.mark.parametrize("peer", [OURS, EAGER])
def test_time(trial: Trial, peer: str, benchmark: Callable[..., Any]) -> None:
    benchmark.group = f"{trial.suite}: {trial.case}"  # type: ignore[attr-defined]
    benchmark(trial.calls[peer]())
