from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptrainer import logs
from gptrainer.cli import main, parse
from gptrainer.data import DATASETS
from gptrainer.logs import EventLog, density, write_csv
from gptrainer.loop import Trainer
from gptrainer.systems import DATA_DEFAULTS, PAIRS, SYSTEMS

QUICK = ("--data", "8gaussians", "--width", "8", "--batch-size", "16", "--eval-every", "3")


def test_curves_of_different_steps_share_one_table(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    write_csv(path, {"step": [2, 4], "loss": [0.5, 0.25]}, {"step": [0, 4], "distance": [9.0, 3.0]})
    with path.open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["step", "loss", "distance"],
            ["0", "", "9.0"],
            ["2", "0.5", ""],
            ["4", "0.25", "3.0"],
        ]


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_gets_scalars_and_images_and_a_resumed_run_continues_them(tmp_path: Path) -> None:
    often = ("--log-every", "2", "--checkpoint-every", "3", "--out", str(tmp_path), "--tensorboard")
    for more in (("--steps", "6"), ("--steps", "9", "--resume")):
        config = parse(["wgan-gp", *QUICK, *often, *more])
        assert config is not None
        Trainer(config).train()
    found = events(tmp_path / "tensorboard")
    scalars = {"critic/wasserstein_estimate", "critic/penalty", "critic/generator_loss", "quality/modes_covered"}
    assert scalars <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("critic/penalty")] == [2, 4, 6, 8]
    assert [event.step for event in found.Images("samples")] == [0, 3, 6, 9]


def test_without_tensorboard_the_run_goes_on_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    log = EventLog(tmp_path, 0, enabled=True)
    log.scalars("critic", {"loss": 1.0}, 1)
    log.samples(torch.zeros(4, 2), 1)
    log.close()
    assert "pip install 'gpkernels[tensorboard]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_not_imported_unless_it_is_wanted(tmp_path: Path) -> None:
    EventLog(tmp_path, 0, enabled=False).scalars("critic", {"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("samples", [torch.rand(70, 3, 8, 8) * 2 - 1, torch.rand(9, 1, 8, 8), torch.rand(50, 1)])
def test_images_of_either_range_and_points_on_a_line_are_logged(samples: torch.Tensor, tmp_path: Path) -> None:
    log = EventLog(tmp_path, 0, enabled=True)
    log.samples(samples, 5)
    log.close()
    tags = events(tmp_path / logs.TENSORBOARD_NAME).Tags()
    assert "samples" in tags["images"] + tags["histograms"]


def test_a_point_up_on_the_right_is_a_dark_cell_up_on_the_right() -> None:
    picture = density(torch.tensor([[2.0, 2.0]]), cells=4)
    assert picture.shape == (1, 4, 4)
    assert picture[0, 0, 3] == 0
    assert picture.sum() == 15


def test_the_list_has_a_line_for_every_system_and_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*SYSTEMS, *DATASETS):
        (line,) = [line for line in lines if line.split()[:1] == [name] and line.startswith("  ")][:1]
        assert len(line.split()) > 2
    assert max(map(len, lines)) <= 120


def test_help_fits_a_terminal_and_names_every_system(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in SYSTEMS)
    assert "--list" in printed


@pytest.mark.parametrize("algorithm", SYSTEMS)
@pytest.mark.parametrize("data", DATASETS)
def test_every_system_has_all_its_values_on_every_data_set(algorithm: str, data: str) -> None:
    config = parse([algorithm, "--data", data])
    assert config is not None
    assert isinstance(config, SYSTEMS[algorithm])
    assert {name for name, value in vars(config).items() if value is None} <= {"limit", "data_dir"}
    assert config.resolved("generator_lr") > 0
    assert config.resolved("generator_batch_size") > 0
    again = parse([algorithm, "--data", data, "--network", config.network])
    assert config == again


def test_the_tables_of_defaults_name_what_there_is() -> None:
    assert DATA_DEFAULTS.keys() == DATASETS.keys()
    assert {algorithm for algorithm, _ in PAIRS} <= SYSTEMS.keys()
    assert {data for _, data in PAIRS} <= DATASETS.keys()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["wgan", "--gamma", "3"], "--gamma: not an option of wgan; it belongs to r1, r2"),
        (["r1", "--one-sided"], "--one-sided: not an option of r1; it belongs to wgan-gp, ct-gan"),
        (["wgan-gp", "--unroll", "3"], "--unroll: not an option of wgan-gp; it belongs to unrolled"),
        (["gan", "--ema", "1"], "--ema: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_an_option_of_another_system_is_a_mistake(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert sys.modules.get("matplotlib.pyplot") is None
