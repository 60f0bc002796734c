from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import unmeasured
from torch import nn

from gpkernels.arguments import UserError
from gptrainer.checkpoint import NAME, PREVIOUS, Checkpoints, Damaged, read
from gptrainer.cli import main, parse
from gptrainer.config import TrainConfig
from gptrainer.loop import Trainer
from gptrainer.stopping import check_losses
from gptrainer.systems import SYSTEMS

MakeConfig = Callable[..., TrainConfig]
QUICK = ("wgan-gp", "--data", "8gaussians", "--width", "8", "--batch-size", "16", "--n-critic", "1")


def states(folder: Path) -> list[int]:
    """The steps that the current and the previous checkpoint hold."""
    return [read(folder / name)["step"] for name in (NAME, PREVIOUS) if (folder / name).exists()]


def same(one: object, other: object) -> bool:
    """Equal to the last bit, whatever they are made of."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_the_checkpoint_before_the_last_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save({"step": step})
    assert states(tmp_path) == [3, 2]
    assert Checkpoints(tmp_path).load() == ({"format": 3, "step": 3}, None)


@pytest.mark.parametrize("place", [0, 10, 30, 100, -1], ids=["magic", "in it", "checksum", "content", "last byte"])
def test_one_changed_byte_is_noticed_and_the_checkpoint_before_it_used(place: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"step": step})
    content = bytearray((tmp_path / NAME).read_bytes())
    content[place] ^= 1
    (tmp_path / NAME).write_bytes(content)
    again = Checkpoints(tmp_path)
    state, note = again.load()
    assert state["step"] == 1
    assert note is not None
    assert "damaged" in note
    assert "resuming from" in note
    assert "step 1" in note
    again.save({"step": 2})  # must not put the damaged one in the place of the good one
    assert states(tmp_path) == [2, 1]


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_truncated_checkpoint_gives_way_to_the_one_before_it(
    kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_quality: None
) -> None:
    straight = continued(tmp_path, 10, resume=False)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[: int(kept * len(whole))])
    resumed = continued(tmp_path, 10, resume=True)
    assert f"resuming from {tmp_path / PREVIOUS}, step 5" in capsys.readouterr().err
    assert same(straight, resumed)


def test_a_kill_between_the_two_renames_loses_nothing_but_the_interval(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"step": step})
    (tmp_path / NAME).unlink()
    state, note = Checkpoints(tmp_path).load()
    assert state["step"] == 1
    assert note is not None
    assert "is missing" in note


def test_when_both_checkpoints_are_damaged_it_says_so_and_leaves_them(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"step": step})
    for name in (NAME, PREVIOUS):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"{NAME} is damaged.*; .*{PREVIOUS} is damaged.*left unchanged"):
        Checkpoints(tmp_path).load()
    assert (tmp_path / NAME).read_bytes() == b"nothing"


def test_a_run_that_starts_anew_leaves_no_checkpoint_of_the_old_one(tmp_path: Path) -> None:
    old = Checkpoints(tmp_path)
    for step in (8, 9):
        old.save({"step": step})
    new = Checkpoints(tmp_path)
    new.save({"step": 1})
    assert states(tmp_path) == [1]
    new.save({"step": 2})
    assert states(tmp_path) == [2, 1]


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"format": 3}, tmp_path / NAME)
    with pytest.raises(Damaged, match="of another kind"):
        read(tmp_path / NAME)


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    """Where processes come from that have all imports behind them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gptrainer.cli"])
    return context


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("delay", [0.0, 0.007, 0.013, 0.031])
def test_a_run_killed_at_any_moment_loses_at_most_an_interval_and_ends_as_if_it_had_not_been(
    delay: float, tmp_path: Path, server: multiprocessing.context.ForkServerContext, no_quality: None
) -> None:
    often = ("--checkpoint-every", "5", "--eval-every", "1000000", "--log-every", "5", "--out", str(tmp_path / "run"))
    process = server.Process(target=unmeasured.train, args=([*QUICK, *often, "--steps", "1000000"],))
    process.start()
    current, previous = tmp_path / "run" / NAME, tmp_path / "run" / PREVIOUS
    deadline = time.monotonic() + 120
    while not (current.exists() and previous.exists()):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    written = states(tmp_path / "run")
    assert all(step % 5 == 0 for step in written)
    assert written[0] - written[-1] in (0, 5)
    resumed = continued(tmp_path / "run", written[0] + 7, resume=True, every=1000000)
    whole = continued(tmp_path / "straight", written[0] + 7, resume=False, every=1000000)
    assert same(resumed, whole)


def continued(out: Path, steps: int, *, resume: bool, every: int = 5) -> dict[str, Any]:
    """The last state of a run to so many steps, with a checkpoint in every so many."""
    often = ("--checkpoint-every", str(every), "--eval-every", "1000000", "--log-every", "5", "--out", str(out))
    config = parse([*QUICK, *often, "--steps", str(steps), *(("--resume",) if resume else ())])
    assert config is not None
    Trainer(config).train()
    state = read(out / NAME)
    del state["config"]
    return state


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_goes_on_bit_for_bit(name: str, tiny: MakeConfig, tmp_path: Path, no_quality: None) -> None:
    more = {"noise_steps": 10} if name == "gan-noise" else {"lazy": 4} if name in ("r1", "r2", "r3gan") else {}
    data = "digits" if name == "ssl-ct-gan" else "8gaussians"
    straight = tiny(algorithm=name, data=data, steps=6, ema=0.9, decay_steps=10, **more)
    whole = Trainer(straight)
    whole.train()
    halves = replace(straight, out=tmp_path / "halves")
    Trainer(replace(halves, steps=3)).train()
    torch.rand(5)
    joined = Trainer(replace(halves, resume=True))
    joined.train()
    one, other = whole.state(), joined.state()
    for state in (one, other):
        del state["config"]
    assert same(one, other)


def test_weights_that_are_no_numbers_stop_the_run_and_the_checkpoint_of_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.train_step

    def spoil(trainer: Trainer) -> dict[str, torch.Tensor]:
        metrics = step(trainer)
        if trainer.step == 4:
            with torch.no_grad():
                trainer.generator[2].weight[0, 0] = torch.nan  # type: ignore[index,union-attr]
        return metrics

    monkeypatch.setattr(Trainer, "train_step", spoil)
    assert main([*QUICK, "--steps", "9", "--checkpoint-every", "2", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "diverged at step 4: the generator's weights are not finite (first 2.weight)" in line
    assert states(tmp_path) == [2]


def test_a_loss_that_is_no_number_stops_the_run_at_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ("gan", "--data", "8gaussians", "--width", "8", "--batch-size", "16", "--lr", "1e30")
    assert main([*wild, "--steps", "50", "--checkpoint-every", "1000", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the run diverged: " in line
    assert " at step " in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e9])
def test_a_loss_is_named_with_the_network_that_broke(value: float) -> None:
    critic, generator = nn.Linear(2, 1), nn.Linear(2, 2)
    check_losses({"critic_loss": 1e6}, 3, {"critic": critic, "generator": generator})
    with pytest.raises(UserError, match=r"critic loss is .* at step 3, all weights are finite"):
        check_losses({"critic_loss": value}, 3, {"critic": critic, "generator": generator})
    critic.bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"the critic's weights are not finite \(first bias\)"):
        check_losses({"critic_loss": value}, 3, {"critic": critic, "generator": generator})
