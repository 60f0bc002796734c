from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptrainer.reproduce import cli, report, runner, store
from gptrainer.reproduce.experiment import (
    Bound,
    Claim,
    Context,
    Exhibits,
    Experiment,
    Findings,
    Judgement,
    NotRun,
    Settings,
    Size,
    Table,
    interval_of_mean,
)
from gptrainer.reproduce.experiments import NAMES, every, find
from gptrainer.reproduce.pictures import Panel, Picture, panel

Measure = Callable[[Settings, int, Context], Findings]


def claim(bound: Bound, only_full: str = "", if_failed: str = "") -> Claim:
    return Claim("It is small", "a paper, eq. 1", "0.1", "size", "the size", bound, "sizes", only_full, if_failed)


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    panels: list[Panel] = []
    with panel(panels, "Sizes") as ax:
        ax.plot([one.measures["size"] for one in findings])
        ax.set(xlabel="seed", ylabel="size")
    return Exhibits({"sizes": Picture("All of them", panels)}, (Table("Rows", ("seed", "size"), [("0", "1 < 2")]),))


def made_up(measure: Measure, *claims: Claim, version: int = 1, name: str = "made-up") -> Experiment:
    return Experiment(
        name=name,
        title="A made-up experiment",
        source="a paper",
        about="About <this>.",
        settings={"quick": {"steps": 1}, "full": {"steps": 2}},
        seeds={"quick": 2, "full": 3},
        measure=measure,
        claims=claims or (claim(Bound(at_most=1)),),
        exhibit=exhibit,
        limits="Small.",
        version=version,
    )


def findings_of(*sizes: float) -> list[Findings]:
    return [Findings({"size": size}) for size in sizes]


@pytest.mark.parametrize(
    ("bound", "sizes", "verdict"),
    [
        pytest.param(Bound(at_most=1), (0.5, 1.0), "held", id="all at most the bound"),
        pytest.param(Bound(at_most=1), (0.5, 1.1), "failed", id="one of two above the bound"),
        pytest.param(Bound(at_least=1), (1.0,), "held", id="at least the bound"),
        pytest.param(Bound(at_least=1), (0.9,), "failed", id="below the least"),
        pytest.param(Bound(1, 2), (2.1,), "failed", id="beyond the far end"),
        pytest.param(Bound(at_most=1, of="the mean"), (0.5, 1.1), "held", id="the mean within"),
        pytest.param(Bound(at_most=1, of="the mean"), (0.5, 1.6), "failed", id="the mean beyond"),
        pytest.param(Bound(at_most=1, of="the mean"), (0.7, 0.8, 0.8, 0.9), "held", id="four seeds, by the mean"),
        pytest.param(Bound(at_most=1, of="the mean"), (0.5, 0.6, 0.7, 0.8, 0.9), "held", id="the interval within"),
        pytest.param(Bound(at_most=1, of="the mean"), (0.5, 0.6, 0.7, 0.8, 1.9), "undecided", id="the interval across"),
        pytest.param(Bound(at_least=1, of="the mean"), (0.1, 0.7, 0.8, 1.9, 1.9), "undecided", id="across from below"),
        pytest.param(Bound(at_most=1, of="the mean"), (1.5, 1.6, 1.7, 1.8, 1.9), "failed", id="the interval above"),
        pytest.param(Bound(at_least=2, of="the mean"), (1.5, 1.6, 1.7, 1.8, 1.9), "failed", id="the interval below"),
        pytest.param(Bound(0.9, 1.1, of="the mean"), (0, 0.5, 1, 1.5, 2), "undecided", id="the bound in the interval"),
        pytest.param(Bound(at_most=1), (0.5, 0.6, 0.7, 0.8, 1.9), "failed", id="one of five above the bound"),
        pytest.param(Bound(at_most=1, of="the mean"), (0.5,) * 4 + (math.nan,), "failed", id="no number among five"),
        pytest.param(Bound(at_most=1), (-math.inf,), "failed", id="infinite"),
        pytest.param(Bound(at_most=1), (math.nan,), "failed", id="no number"),
        pytest.param(Bound(at_most=1), (), "not run", id="no seed"),
    ],
)
def test_a_verdict_follows_from_the_bound(bound: Bound, sizes: tuple[float, ...], verdict: str) -> None:
    assert claim(bound).judge(findings_of(*sizes), "full").verdict == verdict


def test_the_interval_of_a_mean_is_student_s() -> None:
    low, high = interval_of_mean((1.0, 2.0, 3.0, 4.0, 5.0))
    assert (low + high) / 2 == pytest.approx(3)
    assert (high - low) / 2 == pytest.approx(2.776445 * math.sqrt(2.5 / 5))  # t table: 4 degrees of freedom, 97.5 %
    assert interval_of_mean((2.0, 2.0)) == (2, 2)
    with pytest.raises(ValueError, match="values: expected at least two, got 1"):
        interval_of_mean((2.0,))


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        low, high = interval_of_mean(random.normal(3, 2, 5).tolist())
        covered += low <= 3 <= high
    assert 0.93 < covered / 2000 < 0.97  # four standard errors


def test_an_undecided_claim_has_its_interval_in_the_report_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = made_up(Counting(), claim(Bound(at_most=3.5, of="the mean")))
    monkeypatch.setattr(runner, "run", lambda *_, **__: [runner.Outcome(experiment, findings_of(1, 2, 3, 4, 5))])
    assert cli.main(["--out", str(tmp_path), "--strict"]) == 0
    assert "undecided: It is small (the size: 3, interval 1.04 to 4.96, to be at most 3.5)" in capsys.readouterr().out
    (one,) = json.loads((tmp_path / "report.json").read_text())["experiments"]
    assert one["claims"][0]["verdict"] == "undecided"
    assert one["claims"][0]["interval"] == pytest.approx([1.03676, 4.96324], abs=1e-4)
    html = re.sub(r"<[^>]+>", "", (tmp_path / "report.html").read_text())
    assert "1 undecided" in html
    assert "95% interval 1.04 to 4.96" in html


def test_a_measure_that_is_missing_fails_its_claim() -> None:
    assert claim(Bound(at_most=1)).judge([Findings({"other": 0.0})], "full").verdict == "failed"


def test_what_only_the_full_size_can_show_is_not_judged_in_the_quick_one() -> None:
    late = claim(Bound(at_most=1), only_full="too short")
    quick = late.judge(findings_of(9), "quick")
    assert (quick.verdict, quick.values) == ("not run", (9,))
    assert late.judge(findings_of(9), "full").verdict == "failed"


def test_a_failure_in_the_full_set_says_what_it_owes_to() -> None:
    explained = claim(Bound(at_most=1), if_failed="the budget")
    assert explained.judge(findings_of(9), "full") == Judgement("failed", (9,), "the budget")
    assert explained.judge(findings_of(9), "quick").reason == ""
    assert explained.judge(findings_of(0), "full").reason == ""


def test_mean_and_spread_are_over_the_seeds() -> None:
    judgement = claim(Bound(at_most=9)).judge(findings_of(1, 2, 3), "full")
    assert (judgement.mean, judgement.spread) == (2, 1)
    assert claim(Bound(at_most=9)).judge(findings_of(1), "full").spread == 0
    assert math.isnan(claim(Bound(at_most=9)).judge(findings_of(1, math.nan), "full").spread)


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_has_its_source_picture_and_bound(name: str) -> None:
    experiment = find(name)
    assert experiment.name == name.replace("_", "-")
    assert experiment.claims
    for one in experiment.claims:
        assert one.text
        assert one.published
        assert one.what
        assert re.search(r"\d{4}|paper", one.source)
        assert one.picture
        assert str(one.bound)
    json.dumps({size: dict(values) for size, values in experiment.settings.items()})


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[runner.Outcome]]:
    """Runs a made-up experiment in this process."""

    def run(experiment: Experiment, size: Size = "quick", *, fresh: bool = False) -> list[runner.Outcome]:
        monkeypatch.setattr(runner, "find", lambda name: experiment)
        monkeypatch.setattr(runner, "_run_all", in_this_process)
        return runner.run([experiment], size, tmp_path, Context(), jobs=1, seeds=None, fresh=fresh)

    return run


def in_this_process(due: Sequence[runner.Task], total: int, jobs: int) -> dict[tuple[str, int], str]:
    told = {(task.name, task.seed): runner.run_task(task) for task in due}
    return {key: reason for key, reason in told.items() if reason}


class Counting:
    """A measure that counts its calls."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, settings: Settings, seed: int, context: Context) -> Findings:
        self.seeds.append(seed)
        return Findings({"size": float(seed) + settings["steps"]}, {"curve": [1.0, math.nan]})


def test_what_has_a_result_is_not_run_again(stored: Callable[..., list[runner.Outcome]]) -> None:
    measure = Counting()
    (first,) = stored(made_up(measure))
    (again,) = stored(made_up(measure))
    assert measure.seeds == [0, 1]
    assert first.findings == again.findings
    assert [one.measures["size"] for one in again.findings] == [1, 2]
    assert again.findings[0].series["curve"] == [1.0, None]


def test_another_size_or_version_is_run_and_so_is_everything_afresh(
    stored: Callable[..., list[runner.Outcome]],
) -> None:
    measure = Counting()
    stored(made_up(measure))
    stored(made_up(measure), "full")
    assert measure.seeds == [0, 1, 0, 1, 2]
    stored(made_up(measure, version=2))
    assert measure.seeds[5:] == [0, 1]
    stored(made_up(measure, version=2), fresh=True)
    assert measure.seeds[7:] == [0, 1]


@pytest.mark.parametrize("content", ["{", "[1]", '{"key": 1}', ""])
def test_a_damaged_result_is_named_and_run_again(
    content: str,
    stored: Callable[..., list[runner.Outcome]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = Counting()
    experiment = made_up(measure)
    stored(experiment)
    path = store.path_of(tmp_path, experiment, "quick", 1)
    path.write_text(content)
    (outcome,) = stored(experiment)
    assert measure.seeds == [0, 1, 1]
    assert len(outcome.findings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "damaged" in line


def test_one_experiment_that_breaks_is_reported_and_keeps_what_it_has(
    stored: Callable[..., list[runner.Outcome]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(settings: Settings, seed: int, context: Context) -> Findings:
        if seed == 1:
            raise ZeroDivisionError("by zero")
        return Findings({"size": 0.0})

    (outcome,) = stored(made_up(measure))
    assert outcome.crashed
    assert outcome.reason == "ZeroDivisionError: by zero"
    assert len(outcome.findings) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_cannot_run_here_says_why_and_counts_as_not_run(
    stored: Callable[..., list[runner.Outcome]], tmp_path: Path
) -> None:
    def measure(settings: Settings, seed: int, context: Context) -> Findings:
        raise NotRun("there is no data here; put some there")

    outcomes = stored(made_up(measure))
    assert not outcomes[0].crashed
    page, data = report.write(tmp_path, report.sections(outcomes, "quick"), "quick")
    (one,) = json.loads(data.read_text())["experiments"]
    assert one["claims"][0]["verdict"] == "not run"
    assert "there is no data here" in page.read_text()


def test_a_failed_claim_stays_in_the_report_as_failed(
    stored: Callable[..., list[runner.Outcome]], tmp_path: Path
) -> None:
    outcomes = stored(made_up(Counting(), claim(Bound(at_most=1.5)), claim(Bound(at_most=2))))
    page, data = report.write(tmp_path, report.sections(outcomes, "quick"), "quick")
    (one,) = json.loads(data.read_text())["experiments"]
    assert [said["verdict"] for said in one["claims"]] == ["failed", "held"]
    assert one["claims"][0]["values"] == [1, 2]
    html = page.read_text()
    assert "1 held, 1 failed" in html
    assert "1.5 ± 0.707 over 2 seeds" in re.sub(r"<[^>]+>", "", html)


def test_the_page_needs_nothing_beside_itself_and_escapes_what_it_says(
    stored: Callable[..., list[runner.Outcome]], tmp_path: Path
) -> None:
    page, _ = report.write(tmp_path, report.sections(stored(made_up(Counting())), "quick"), "quick")
    html = page.read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', html)
    assert addresses
    assert all(address.startswith(("data:", "#")) for pair in addresses for address in pair if address)
    assert "<script" not in html
    assert html.count("<img ") == 1
    assert "About &lt;this&gt;." in html
    assert "1 &lt; 2" in html


def test_the_same_results_give_the_same_pictures() -> None:
    first, second = (exhibit(findings_of(1, 2)).pictures["sizes"].panels[0].uri for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(["dirac"], "dirac", id="unknown experiment"),
        pytest.param(["--seeds", "0"], "--seeds", id="no seeds"),
        pytest.param(["--jobs", "two"], "--jobs", id="jobs that are no number"),
        pytest.param(["--fast"], "--fast", id="unknown option"),
        pytest.param(["--out"], "--out", id="option without its value"),
        pytest.param(["--data-dir", "/nowhere"], "--data-dir: expected a folder, got /nowhere", id="no folder of data"),
        pytest.param(["--out", "/dev/null/runs"], "--out /dev/null/runs: Not a directory", id="folder in a file"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert told.out == ""
    assert line.startswith("gpkernels reproduce: ")
    assert said in line


def test_the_list_names_every_experiment_and_runs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [experiment.name for experiment in every()]


def test_the_list_says_what_needs_fashion_mnist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    needy = {name for name, line in lines.items() if "needs Fashion-MNIST" in line}
    assert needy == {"perfect-discrimination", "meaningful-loss", "overfitting", "all-systems"}
    for name in needy:
        assert ("for the full set" in lines[name]) == (name != "perfect-discrimination")


@pytest.mark.parametrize("size", [0.5, 9.0], ids=["claims held", "a claim failed"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_failed_claim_gives_exit_code_1_under_strict_alone(
    size: float, strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = runner.Outcome(made_up(Counting()), findings_of(size))
    monkeypatch.setattr(runner, "run", lambda *_, **__: [outcome])
    code = cli.main(["--out", str(tmp_path), *(["--strict"] if strict else [])])
    assert code == (1 if strict and size > 1 else 0)
    assert ("failed: It is small (the size: 9, not at most 1)" in capsys.readouterr().out) == (size > 1)


def test_known_failures_head_the_report_with_their_cause(tmp_path: Path) -> None:
    known = replace(claim(Bound(at_most=1), if_failed="the budget is too small"), design="more steps")
    experiment = made_up(Counting(), known)
    page, data = report.write(tmp_path, report.sections([runner.Outcome(experiment, findings_of(9))], "full"), "full")
    assert json.loads(data.read_text())["known_failures"] == {
        "It is small": {"cause": "the budget is too small", "design": "more steps"}
    }
    html = page.read_text()
    assert 0 < html.index("Known failures") < html.index("the budget is too small") < html.index("<nav")
    assert html.index("more steps") < html.index("<nav")


@pytest.mark.parametrize("name", NAMES)
def test_every_known_failure_has_a_design_that_could_hold_and_seeds_for_an_interval(name: str) -> None:
    experiment = find(name)
    for one in experiment.known_failures:
        assert one.design
        assert one.bound.by_interval([0.0] * experiment.seeds["full"])


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "the same command continues" in line


def test_the_command_runs_reports_and_resumes_in_processes_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpkernels.cli import main

    argv = ["reproduce", "cauchy-gradients", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    result = store.path_of(tmp_path, find("cauchy-gradients"), "quick", 0)
    written = result.stat().st_mtime_ns
    assert main(argv) == 0
    assert result.stat().st_mtime_ns == written
    told = capsys.readouterr().out
    assert "cauchy-gradients       4 held" in told
    assert str(tmp_path / "report.html") in told


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are told by /proc")
def test_a_command_that_is_ended_from_outside_leaves_no_process_behind(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "gpkernels", "reproduce", "dirac-gan", "--jobs", "1", "--out", str(tmp_path)]
    command = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    try:
        while len(started := children.read_text().split()) < 2:  # multiprocessing's tracker, and what measures
            assert command.poll() is None
            time.sleep(0.05)
        command.send_signal(signal.SIGTERM)
        told = command.communicate(timeout=60)[1]
    finally:
        command.kill()
    assert command.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in told
    end = time.monotonic() + 30
    while any(_lives(pid) for pid in started):
        assert time.monotonic() < end, "a process lives on"
        time.sleep(0.05)


def _lives(pid: str) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
