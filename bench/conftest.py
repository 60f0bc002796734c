"""One thread, CPU time, and reuse of freed memory, as in `gpkernels bench`."""

from __future__ import annotations

import pytest
import torch

from gpkernels.bench import machine


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_timer = "time.process_time"
    torch.set_num_threads(1)
    machine.keep_freed_memory()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="every case, large ones, too, in place of the quick ones")
