from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gptrainer import checkpoint, logs, loop, report
from gptrainer.checkpoint import pack
from gptrainer.cli import main, parse
from gptrainer.systems import configure

QUICK = ("wgan-gp", "--data", "8gaussians", "--width", "8", "--batch-size", "16", "--steps", "3")


def write(content: object, path: Path) -> None:
    """A checkpoint of anything, with the right checksum."""
    path.write_bytes(pack(content))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(["wgan-gp", "--data", "moons"], "moons", id="unknown data"),
        pytest.param(["dcgan"], "dcgan", id="unknown algorithm"),
        pytest.param([], "wgan", id="no algorithm"),
        pytest.param(["wgan", "--fast"], "--fast", id="unknown option"),
        pytest.param(["wgan", "digits"], "digits: not an option of wgan", id="value without its option"),
        pytest.param(["wgan", "--data"], "--data", id="option without its value"),
        pytest.param(["--data", "digits", "wgan"], "--data: expected after the name", id="option before the system"),
        pytest.param(["wgan", "--network", "vae"], "vae", id="unknown network"),
        pytest.param(["wgan", "--steps", "-3"], "--steps", id="negative steps"),
        pytest.param(["wgan", "--steps", "many"], "--steps", id="steps that are no number"),
        pytest.param(["wgan", "--lr", "nan"], "--lr", id="learning rate that is no number"),
        pytest.param(["wgan", "--clip", "0"], "--clip", id="clipping everything away"),
        pytest.param(["wgan-gp", "--lambda", "-1"], "--penalty-weight", id="negative penalty weight"),
        pytest.param(["wgan-gp", "--betas", "0", "1"], "--betas", id="beta of one"),
        pytest.param(["wgan", "--seed", "-1"], "--seed", id="negative seed"),
        pytest.param(["wgan", "--batch-size", "0"], "--batch-size", id="empty batch"),
        pytest.param(["wgan", "--threads", "0"], "--threads", id="no threads"),
        pytest.param(["wgan", "--device", "abacus"], "--device", id="unknown device"),
        pytest.param(["wgan", "--data", "digits", "--batch-size", "5000"], "--batch-size", id="batch beyond the data"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(
    argv: Sequence[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if not argv else ["--out", str(tmp_path / "run")]
    assert main([*argv, *out]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("gpkernels train: ")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_defaults_are_those_of_the_papers() -> None:
    gp, clipping = parse(["wgan-gp"]), parse(["wgan"])
    assert gp is not None
    assert (gp.n_critic, gp.lr, gp.betas, gp.penalty_weight) == (5, 1e-4, (0.0, 0.9), 10.0)
    assert clipping is not None
    assert (clipping.n_critic, clipping.lr, clipping.clip, clipping.batch_size) == (5, 5e-5, 0.01, 64)
    assert configure("wgan-gp", "8gaussians").penalty_weight == 0.1
    assert gp.out == Path("runs/wgan-gp-digits")


def test_options_of_the_generator_follow_those_of_the_critic() -> None:
    config = parse(["gan-noise", "--lr", "0.5", "--steps", "7"])
    assert config is not None
    settings = config.settings()
    assert (settings["generator_lr"], settings["noise_steps"], settings["generator_batch_size"]) == (0.5, 7, 48)
    apart = parse(["unrolled", "--lr", "0.5"])
    assert apart is not None
    assert apart.settings()["generator_lr"] == 1e-3


def test_the_penalty_weight_can_be_called_lambda() -> None:
    config = parse(["wgan-gp", "--lambda", "3"])
    assert config is not None
    assert config.penalty_weight == 3


def test_help_names_every_option_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wgan-gp", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("--data", "--steps", "--resume", "--lambda", "--out", "--seed", "--device"):
        assert name in printed


def test_resuming_without_a_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--out", str(tmp_path), "--resume"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_gives_one_line_and_stays_as_it_is(
    kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse([*QUICK, "--out", str(tmp_path)])
    assert config is not None
    loop.Trainer(config).save()
    path = tmp_path / checkpoint.NAME
    broken = path.read_bytes()[: int(kept * path.stat().st_size)]
    path.write_bytes(broken)
    assert main([*QUICK, "--out", str(tmp_path), "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line
    assert path.read_bytes() == broken
    assert {p.name for p in tmp_path.iterdir()} == {checkpoint.NAME, logs.CSV_NAME}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([1, 2], id="a list"),
        pytest.param({"format": 99}, id="another format"),
        pytest.param({"format": 2, "config": {"algorithm": "wgan-gp"}}, id="an older format"),
        pytest.param({"format": checkpoint.FORMAT}, id="nothing but a format"),
        pytest.param({"format": checkpoint.FORMAT, "config": 3}, id="a config that is none"),
    ],
)
def test_a_file_of_something_else_is_not_resumed(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(content, tmp_path / checkpoint.NAME)
    assert main([*QUICK, "--out", str(tmp_path), "--resume"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_checkpoint_of_an_earlier_version_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / checkpoint.NAME
    path.write_bytes(checkpoint.OLD_MAGIC + bytes(100))
    assert main([*QUICK, "--out", str(tmp_path), "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} was written by another version" in line


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(Trap.path),)  # type: ignore[return-value]

    path = ""


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trap.path = str(tmp_path / "sprung")
    write({"format": checkpoint.FORMAT, "config": Trap()}, tmp_path / checkpoint.NAME)
    assert main([*QUICK, "--out", str(tmp_path), "--resume"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not Path(Trap.path).exists()


def test_resuming_with_other_settings_names_the_first_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse([*QUICK, "--out", str(tmp_path)])
    assert config is not None
    loop.Trainer(config).save()
    assert main([*QUICK, "--out", str(tmp_path), "--resume", "--lr", "0.5"]) == 2
    assert re.search(r"lr 0\.0001, not 0\.5", capsys.readouterr().err)


def test_a_run_folder_that_cannot_be_made_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([*QUICK, "--out", str(tmp_path / "file" / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"gpkernels train: --out {tmp_path / 'file' / 'run'}: Not a directory"


def test_a_run_that_is_finished_says_so_and_that_more_steps_continue_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    assert "finished" not in capsys.readouterr().err
    assert main([*QUICK, "--out", str(tmp_path), "--resume"]) == 0
    said = f"the run in {tmp_path} is finished, at step 3; a larger --steps continues it"
    assert said in capsys.readouterr().err.splitlines()


def test_every_file_of_a_run_can_be_read_by_whom_its_neighbours_can(tmp_path: Path) -> None:
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "generator.safetensors").is_file()
    assert len({path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_ends_with_128_and_its_number(
    number: signal.Signals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_quality: None,
) -> None:
    step = loop.Trainer.train_step

    def step_and_ctrl_c(trainer: loop.Trainer) -> dict[str, torch.Tensor]:
        if trainer.step == 1:
            signal.raise_signal(number)
        return step(trainer)

    monkeypatch.setattr(loop.Trainer, "train_step", step_and_ctrl_c)
    assert main([*QUICK, "--out", str(tmp_path)]) == 128 + number
    assert "stopped at step 2" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoint.read(tmp_path / checkpoint.NAME)["step"] == 2
    monkeypatch.setattr(loop.Trainer, "train_step", step)
    monkeypatch.setattr(report, "write_report", lambda *_: [])
    assert main([*QUICK, "--out", str(tmp_path), "--resume"]) == 0
    assert checkpoint.read(tmp_path / checkpoint.NAME)["step"] == 3


def test_ctrl_c_before_the_first_step_ends_with_130_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "build_quality", stop)
    assert main([*QUICK, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "gpkernels train: stopped\n"


def test_importing_gpkernels_does_not_import_the_trainer_nor_the_trainer_pyplot() -> None:
    code = (
        "import sys, gpkernels; assert not any(m.split('.')[0] == 'gptrainer' for m in sys.modules);"
        "import gptrainer.cli; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
