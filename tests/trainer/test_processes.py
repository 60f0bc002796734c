from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

from gptrainer import checkpoint
from gptrainer.cli import main
from gptrainer.processes import Draws, Processes

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """What one process and two have written, and what the two said."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    two_processes.train_all(Processes(), str(one))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHER, two_processes.__file__, str(two)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return one, two, done.stdout


def curves(path: Path) -> dict[str, list[float]]:
    with (path / "curves.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[1:]  # the first is of the start
    names = [name for name in rows[0] if name != "gradient_norm" and rows[0][name]]  # that one is at other points
    return {name: [float(row[name]) for row in rows] for name in names}


@pytest.mark.parametrize("system", two_processes.SYSTEMS)
def test_two_processes_have_the_losses_of_one_on_the_joined_batch(system: str, trained: tuple[Path, Path, str]) -> None:
    one, two = (curves(folder / system) for folder in trained[:2])
    assert one.keys() == two.keys()
    assert len(one["step"]) == 6
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name


def test_two_processes_have_the_weights_of_one(trained: tuple[Path, Path, str]) -> None:
    one, two = (checkpoint.read(folder / "wgan-gp" / checkpoint.NAME) for folder in trained[:2])
    for network in ("critic", "generator"):
        for name, weight in one[network].items():
            assert torch.allclose(weight, two[network][name], rtol=1e-6, atol=1e-9), name


def test_two_processes_go_on_bit_for_bit(trained: tuple[Path, Path, str]) -> None:
    straight, joined = (curves(trained[1] / name) for name in ("wgan-gp", "halves"))
    assert straight == joined


def test_a_batch_that_cannot_be_shared_out_is_refused_by_each_process(trained: tuple[Path, Path, str]) -> None:
    said = trained[2]
    assert said.count("--batch-size: expected a multiple of the 2 processes, got 33") == 2


def test_a_run_of_two_processes_is_not_continued_by_one(
    trained: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--data", "8gaussians", "--steps", "6", "--width", "8", "--batch-size", "32", "--n-critic", "2")
    more = ("--log-every", "1", "--eval-every", "6", "--out", str(trained[1] / "gan"), "--resume")
    assert main(["gan", *quick, *more]) == 2
    assert "has 2 processes, not 1" in capsys.readouterr().err


def test_the_rows_of_two_processes_are_those_of_one() -> None:
    alone = Draws(Processes(), 3, torch.device("cpu"))
    pair = [Draws(Processes(rank, 2), 3, torch.device("cpu")) for rank in (0, 1)]
    x = torch.randn(8, 3)
    whole = alone.normal(8, 2), alone.uniform(x), alone.noisy(x, 0.5)
    parts = [(d.normal(8, 2), d.uniform(x[:4]), d.noisy(x[d.processes.rank :: 2], 0.5)) for d in pair]
    for together, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(together[0::2], first)
        assert torch.equal(together[1::2], second)
