"""`gpkernels bench`: counts are right, results can be read back, and regressions are reported."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gpkernels import cli, info
from gpkernels.arguments import written
from gpkernels.bench import counts, jax_step, machine, ops, results, steps
from gpkernels.bench.cases import CASES, Case
from gpkernels.bench.clock import time_in_turns
from gpkernels.bench.results import Row
from gpkernels.bench.trial import COMPILED, EAGER, LIMIT, OURS, Trial, measure
from gpkernels.zoo import mlp

CPU = torch.device("cpu")
FAST = ["--quick", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: True)  # it would last as long as the process
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def row(case: str = "a case", peer: str = OURS, cpu: float = 10.0, **others: object) -> Row:
    return replace(Row("ops", case, peer, cpu, cpu * 1.02, cpu, cpu, 9, 2.0, 0.5, 100, 3, 1000, 10000), **others)


# --- the command ------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_written_as_table_csv_json_page_and_pictures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {name: tmp_path / "new" / f"rows.{name}" for name in ("csv", "json", "html")}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    code, page, _ = told(capsys, "ops", *FAST, "--case", "penalty", *options, "--plots", str(tmp_path / "plots"))
    assert code == 0
    whole = json.loads(files["json"].read_text())
    assert {row["peer"] for row in whole["rows"]} == {OURS, EAGER, LIMIT}
    assert {"device", "threads", "torch", "gpkernels", "load"} <= whole["machine"].keys()
    assert [repr(row) for row in results.read(files["csv"])] == [repr(row) for row in results.read(files["json"])]
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert {line["device"] for line in lines} == {info.processor()}
    assert {line["torch"] for line in lines} == {torch.__version__}
    html = files["html"].read_text()
    for measured in whole["rows"]:
        assert measured["case"] in page
        assert measured["case"] in html
    assert "<svg" in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html), "a page that needs another file"
    assert (tmp_path / "plots" / "ops.svg").read_text().count("<svg") == 1


def test_a_users_critic_is_measured_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_to_bench.py").write_text(
        "from torch import nn\n\nclass Critic(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    code, page, _ = told(capsys, "--critic", "mine_to_bench:Critic", "--input", "4x6", "--seconds", "0.001")
    assert code == 0
    cases = {line.split("  ")[0] for line in page.splitlines() if " gpkernels  " in line}
    assert cases == {"mine_to_bench:Critic, 4x6, penalty", "mine_to_bench:Critic, 4x6, step"}


def test_whole_training_iterations_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gptrainer.benchmark")
    code, page, _ = told(capsys, "train", *FAST)
    assert code == 0
    assert "wgan-gp, 8 Gaussians, MLP 128" in page


MISTAKES = {
    "a suite that is none": (["everything"], "expected one of ops, attention, gradients, steps, train"),
    "a peer that is none": (["--peers", "eager,theano"], "expected some of eager, compile, jax, jvp"),
    "a case that is none": (["ops", *FAST, "--case", "no such"], "expected part of a case's name, got no such"),
    "a case of two": (["ops", *FAST, "--case", "small", "--case", "no such"], "case's name, got no such"),
    "a critic without a shape": (["--critic", "torch.nn:Identity"], "--critic and --input: expected both"),
    "a critic that is no module": (["--critic", "math:sqrt", "--input", "2x2"], "expected a torch.nn.Module"),
    "a critic with another suite": (["ops", "--critic", "torch.nn:Identity", "--input", "2x2"], "expected steps"),
    "growth of a critic": (["--growth", "--critic", "torch.nn:Identity", "--input", "2x2"], "--growth: expected"),
    "a shape that does not fit": (["--critic", "tests_bad:Bad", "--input", "2x2"], "tests_bad"),
    "results that are not there": (["--compare", "nowhere.csv", "nowhere.csv"], "nowhere.csv: No such file"),
    "a file that cannot be written": (["ops", "--json", "/dev/null/a.json"], "--json /dev/null/a.json: "),
    "a folder that cannot be made": (["ops", "--plots", "/dev/null/plots"], "--plots /dev/null/plots: Not a dir"),
    "seconds that are no number": (["--seconds", "nan"], "--seconds: expected a number above 0, got nan"),
    "no threads": (["--threads", "0"], "--threads: expected a whole number above 0, got 0"),
    "a device that is not there": (["--device", "cuda"], "expected an available device, got cuda"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if said.endswith("got cuda") and torch.cuda.is_available():
        pytest.skip("there is such a device")
    code, page, error = told(capsys, *arguments)
    assert code == 2
    assert page == "", "nothing is measured, nor a heading printed"
    assert error.startswith("gpkernels bench: ")
    assert said in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "content", ["", "not,results\n1,2\n", "{", '{"rows": [{"suite": "ops"}]}', "\x00\x01"], ids=repr
)
@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_file_of_something_else_is_named(
    content: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(content)
    code, _, error = told(capsys, "--compare", str(path), str(path))
    assert code == 2
    assert str(path) in error


PROBE = """<script>addEventListener("load", () => {
  const seen = [document.documentElement, ...document.querySelectorAll(".scroll")];
  document.title = JSON.stringify(seen.map(element => [element.scrollWidth, element.clientWidth]));
});</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("name", ["xeon-avx512-1-thread", "xeon-avx512-1-thread-steps"])
def test_the_whole_table_of_the_page_is_seen_in_a_window_of_1280_pixels(name: str, tmp_path: Path) -> None:
    from gpkernels.bench import page

    path = tmp_path / "page.html"
    rows = results.read(Path(__file__).parent.parent / "bench" / "results" / f"{name}.csv")
    page.write(path, machine.facts(CPU), rows, ["the machine was busy"])
    path.write_text(path.read_text().replace("<head>", f"<head>{PROBE}", 1))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--dump-dom", path.as_uri()]
    done = subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120, check=True)
    (answer,) = re.findall(r"<title>(\[.*?)</title>", done.stdout)
    widths = json.loads(answer)
    assert len(widths) == 2
    assert all(whole <= shown <= 1280 for whole, shown in widths)


def test_ctrl_c_while_a_file_is_written_leaves_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("before")

    def interrupted() -> None:
        with written("--json", path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("rows.json", "before")]
    with written("--json", path) as part:
        part.write_text("after")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("rows.json", "after")]


# --- comparing --------------------------------------------------------------------------------------------------------


def compared(capsys: pytest.CaptureFixture[str], folder: Path, old: list[Row], new: list[Row]) -> tuple[int, str]:
    about = dict.fromkeys(results.CONTEXT, "same")
    results.write_csv(folder / "old.csv", about, old)
    results.write_json(folder / "new.json", about, new, [])
    code, said, _ = told(capsys, "--compare", str(folder / "old.csv"), str(folder / "new.json"))
    return code, said


@pytest.mark.parametrize(
    ("change", "code", "said"),
    {
        "nothing": ({}, 0, "0 changes"),
        "a little slower": ({"speedup": 1.9}, 0, "0 changes"),
        "much slower": ({"speedup": 1.5}, 1, "2.00 -> 1.50 times as fast as eager, slower"),
        "much faster": ({"speedup": 2.6}, 0, "faster"),
        "one more operation": ({"calls": 4}, 1, "calls 3 -> 4"),
        "more FLOPs": ({"flops": 101}, 1, "flops 100 -> 101"),
        "fewer bytes": ({"bytes": 900}, 0, "bytes 1000 -> 900"),
        "much more memory": ({"peak_bytes": 90000}, 1, "peak bytes 10000 -> 90000"),
    }.values(),
    ids=[
        "nothing", "a little slower", "much slower", "much faster", "one more operation", "more FLOPs", "fewer bytes",
        "much more memory",
    ],
)  # fmt: skip
def test_a_regression_beyond_noise_ends_with_1(
    change: dict[str, float], code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    eager = row(peer=EAGER, cpu=20.0)
    ended, page = compared(capsys, tmp_path, [row(), eager], [row(**change), eager])
    assert ended == code
    assert said in page


def test_a_slow_day_is_no_regression(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old, new = ([row(cpu=10.0 * slow), row(peer=EAGER, cpu=20.0 * slow)] for slow in (1.0, 1.8))
    assert compared(capsys, tmp_path, old, new)[0] == 0


def test_what_scatters_more_must_change_more(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    eager = row(peer=EAGER, cpu=20.0)
    slower = row(speedup=1.6)
    assert compared(capsys, tmp_path, [row(), eager], [slower, eager])[0] == 1
    assert compared(capsys, tmp_path, [row(), eager], [replace(slower, cpu_median_us=14.0), eager])[0] == 0


# --- measuring --------------------------------------------------------------------------------------------------------


def test_calls_are_taken_in_turns_and_each_as_often() -> None:
    taken: list[str] = []

    def call(name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            taken.append(name)
            time.sleep(milliseconds / 1e3)

        return run

    times = time_in_turns({"a": call("a", 1), "b": call("b", 2)}, CPU, 0.0)
    assert taken[-6:] == ["a", "b"] * 3
    assert times["a"].rounds == times["b"].rounds
    assert times["b"].wall >= 2e3
    assert times["b"].cpu < times["b"].wall


def test_a_peer_that_fails_is_told_and_the_others_are_measured() -> None:
    def broken() -> Callable[[], object]:
        raise RuntimeError("no double backward\nand more")

    x = torch.randn(4)
    trial = Trial("ops", "a case", {OURS: lambda: x.exp, EAGER: lambda: x.exp, "compile": broken}, lambda: x.exp)
    measured = measure(trial, [EAGER, "compile"], CPU, 0.0)
    assert [row.peer for row in measured.rows] == [OURS, EAGER, LIMIT]
    assert measured.absent == {"compile": "RuntimeError: no double backward"}


def test_speedup_and_share_of_the_limit_follow_from_the_times() -> None:
    x = torch.randn(100_000)
    trial = Trial("ops", "a case", {OURS: lambda: x.exp, EAGER: lambda: x.tan}, lambda: x.exp, limit_share=0.5)
    ours, eager, least = measure(trial, [EAGER], CPU, 0.01).rows
    assert ours.speedup == pytest.approx(eager.cpu_us / ours.cpu_us, rel=2e-3)
    assert eager.speedup == 1
    assert ours.limit_share == pytest.approx(least.cpu_us / ours.cpu_us, rel=2e-3)


def test_flops_operations_and_bytes_are_counted() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    found = counts.count(lambda: (a @ b).t().exp(), CPU)
    assert found.flops == 2 * 8 * 16 * 4
    assert found.calls == 2, "a view is none"
    assert found.bytes == 4 * (8 * 16 + 16 * 4 + 3 * 8 * 4)
    assert found.peak >= 2 * 4 * 8 * 4


def test_bare_products_are_those_of_the_call() -> None:
    step = steps.Step.of(Case(lambda: mlp(2, 8, 1), (4, 2)), CPU)
    trial = steps.step_trial("a step", step)
    bare = trial.limit()
    assert counts.watched(bare).flops == counts.watched(trial.calls[OURS]()).flops > 0
    assert counts.watched(bare).calls < counts.watched(trial.calls[EAGER]()).calls


@pytest.mark.parametrize("name", [name for name in ops.OPS if name != "add_instance_noise"])  # which is drawn anew
def test_both_sides_of_an_op_give_the_same(name: str) -> None:
    torch.manual_seed(0)
    batch = ops.Batch.draw((16, 3, 4, 4), CPU)
    op = ops.OPS[name]
    ours, eager = op.ours(batch)(), op.eager(batch)()
    if ours is None:
        ours = eager = batch.cotangent
    for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (ours, eager)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["MLP 2-64x3-1, N 64", "residual GroupNorm(1), N 8"])
def test_all_spellings_of_a_step_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A compiler is not what is tested.
    monkeypatch.setattr(torch, "compile", lambda function, backend=None: function)
    case = CASES[name]
    step = steps.Step.of(replace(case, shape=(4, *case.shape[1:])), CPU)
    for trial in (steps.penalty_trial("p", step), steps.step_trial("s", step), steps.r1_trial("r", step)):
        ours, eager = ([g for g in trial.calls[peer]()() if g is not None] for peer in (OURS, EAGER))
        compiled = list(trial.calls["compile"]()().values())
        scale = max(float(g.abs().max()) for g in eager)
        for a, b in zip(ours[: len(eager)], eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)
        for peer in COMPILED["compile"]:
            again = [g for g in trial.calls[peer]()() if g is not None]
            torch.testing.assert_close(again, ours, rtol=1e-4, atol=1e-5 * scale)
        for a, b in zip([g for g in compiled if g.any()], [g for g in eager if g.any()], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_jax_gives_the_same_gradients() -> None:
    pytest.importorskip("jax")
    step = steps.Step.of(Case(lambda: mlp(2, 8, 8, 1), (16, 2)), CPU)
    assert jax_step.can_do(step.critic)
    theirs = jax_step.step(step.critic, step.real, step.fake, step.eps)()
    ours = steps.step_trial("s", step).calls[OURS]()()
    for (w, b), (ours_w, ours_b) in zip(theirs, zip(ours[::2], ours[1::2], strict=True), strict=True):
        torch.testing.assert_close(torch.tensor(w.tolist()).T, ours_w, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.tensor(b.tolist()), ours_b, rtol=1e-4, atol=1e-6)


def test_jax_takes_only_what_it_can_do() -> None:
    assert not jax_step.can_do(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    assert not jax_step.can_do(nn.Linear(2, 1))


def test_both_trainers_begin_alike_and_train() -> None:
    benchmark = pytest.importorskip("gptrainer.benchmark")
    for name, options in benchmark.CASES.items():
        trial = benchmark.trial(name, CPU, {**options, "batch_size": 8})
        for peer in (OURS, EAGER):
            trial.calls[peer]()()
        assert counts.watched(trial.calls[EAGER]()).flops > counts.watched(trial.calls[OURS]()).flops


@pytest.mark.parametrize("suite", ["ops", "steps", "train"])
def test_curves_reach_ten_times_the_zoo(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if suite == "train":
        points = growth_of(pytest.importorskip("gptrainer.benchmark"), "trial", monkeypatch)
        assert max(points["wgan-gp on 8 Gaussians: batch size"]) >= 10 * 256
        assert max(points["wgan-gp on 8 Gaussians: width"]) >= 10 * 128
    elif suite == "steps":
        monkeypatch.setattr(steps.Step, "of", lambda case, device: case)
        points = growth_of(steps, "step_trial", monkeypatch)
        for axis, base in (("batch", 64), ("width", 512), ("depth", 3), ("pixels", 32)):
            assert max(max(sizes) for name, sizes in points.items() if name.endswith(axis)) >= 10 * base
    else:
        monkeypatch.setattr(ops, "beyond_caches", lambda device: (256, 1 << 21))
        monkeypatch.setattr(ops.Batch, "draw", lambda shape, device: shape)
        points = growth_of(ops, "_trial", monkeypatch)
        assert len(points) == len(ops.OPS)
        assert all(max(sizes) >= 10 * 64 * 3072 for sizes in points.values())


def growth_of(module: object, maker: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The sizes on each axis, with nothing made."""
    points: dict[str, list[int]] = {}

    def noted(*_: object, axis: str, size: int) -> None:
        points.setdefault(axis, []).append(size)

    monkeypatch.setattr(module, maker, noted)
    list(module.growth(CPU))  # type: ignore[attr-defined]
    for sizes in points.values():
        assert sizes == sorted(set(sizes))
    return points


def test_a_busy_machine_is_told() -> None:
    assert machine.warnings(0.1, 1.0) == []
    assert "load of 3.0" in machine.warnings(3.0, 1.0)[0]
    assert "1.50 times" in machine.warnings(0.0, 1.5)[0]


def test_large_arrays_do_not_fit_into_the_caches() -> None:
    rows, cols = ops.beyond_caches(CPU)
    size = 4 * rows * cols
    assert size > machine.last_level_cache() or 0.9 < 48 * size / machine.memory() <= 1
    assert 2**27 < machine.memory() < float("inf")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_the_device_has_a_name() -> None:
    about = machine.facts(CPU)
    assert about["device"]
    assert not math.isnan(about["load"])
