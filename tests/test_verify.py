"""`gpkernels verify` passes, detects errors, and prints the command that repeats a failed case."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from gpkernels import arguments, backends, cli
from gpkernels.verify import cases, critics, training

QUICK = ["verify", "--quick", "--verbose", "--backend", "reference"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main([*QUICK, *arguments])
    return code, capsys.readouterr().out


def test_an_op_is_told_with_every_check_in_every_dtype(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    code, page = told(capsys, "--op", "penalty_two_sided", "--json", str(path))
    assert code == 0
    for said in ("value", "gradient", "second gradient", "same bits", "edge values", *cases.DTYPES, "none failed"):
        assert said in page
    results = json.loads(path.read_text())["results"]
    assert all(r["ok"] for r in results)
    assert {r["dtype"] for r in results} == set(cases.DTYPES)
    assert any(r["relative"] > 0 for r in results)


def test_a_summary_has_a_line_for_each_backend_and_dtype_and_what_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["verify", "--quick", "--backend", "reference", "--op", "penalty_two_sided"]
    assert cli.main([*given, "--dtype", "float64", "--dtype", "float32"]) == 0
    header, double, single, legend, verdict = capsys.readouterr().out.splitlines()
    assert header.split() == ["backend", "checked", "dtype", "cases", "failed", "largest", "relative", "error"]
    assert double.split()[:3] == ["reference", "ops", "float64"]
    assert single.split()[:3] == ["reference", "ops", "float32"]
    assert double.split()[4] == "0"
    assert "--verbose" in legend
    assert verdict == f"{int(double.split()[3]) + int(single.split()[3])} cases, none failed"
    case = cases.CASES["penalty_two_sided"]
    monkeypatch.setitem(cases.CASES, "penalty_two_sided", replace(case, function=steep(case.function)))
    assert cli.main([*given, "--dtype", "float64"]) == 1
    page = capsys.readouterr().out
    assert page.splitlines()[1].split()[4] != "0"
    assert page.count("FAILED") == page.count("again: gpkernels verify") == int(page.splitlines()[1].split()[4])
    assert page.splitlines()[-1].endswith(f"cases, {page.count('FAILED')} failed")


@pytest.mark.skipif(backends.extension is None, reason="the extension is not built")
@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("penalty")])
def test_the_cpu_kernels_of_penalties_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms that are denormal, among others."""
    assert cli.main(["verify", "--quick", "--backend", "cpu", "--op", name, "--dtype", "float32"]) == 0, (
        capsys.readouterr().out
    )


def test_penalties_and_training_agree_with_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    code, page = told(capsys, "--op", "penalties", "--op", "training")
    assert code == 0
    for said in (*critics.ZOO, *critics.IDIOMS, "WGAN-GP"):
        assert said in page


def off(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A value that is a little wrong, at no cost to its gradients."""
    return lambda *tensors: function(*tensors) + 1e-2


def steep(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Right in its value, wrong in its gradients."""
    return lambda *tensors: (value := function(*tensors)).detach() + 1.01 * (value - value.detach())


def nan_at_zero(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As norms by a square root of a sum are."""
    return lambda x: ((x.flatten(1).square().sum(1).sqrt() - 1) ** 2).mean()


def by_threads(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Other bits with another number of threads."""
    return lambda *tensors: function(*tensors) * (1 + 1e-15 * torch.get_num_threads())


@pytest.mark.parametrize(
    ("break_it", "check"),
    [(off, "value"), (steep, "gradient"), (nan_at_zero, "edge values"), (by_threads, "same bits")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_an_op_that_is_wrong_fails_and_says_how_to_run_it_again(
    break_it: Callable[..., Callable[..., Tensor]],
    check: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = cases.CASES["penalty_two_sided"]
    monkeypatch.setitem(cases.CASES, "penalty_two_sided", replace(case, function=break_it(case.function)))
    code, page = told(capsys, "--op", "penalty_two_sided", "--dtype", "float64")
    assert code == 1
    assert f"FAILED {check} of penalty_two_sided, reference, float64" in page
    assert "gpkernels verify --backend reference --op penalty_two_sided --dtype float64" in page


def test_one_eps_for_a_whole_batch_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled, _ = critics.IDIOMS["calc_gradient_penalty"]

    def wrong(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
        return gpk.gradient_penalty(critic, real, fake, eps=eps[:1].expand_as(eps))

    monkeypatch.setitem(critics.IDIOMS, "calc_gradient_penalty", (spelled, wrong))
    code, page = told(capsys, "--op", "penalties", "--dtype", "float32")
    assert code == 1
    assert "FAILED penalty of DCGAN, reference, float32, calc_gradient_penalty" in page
    assert "FAILED penalty of DCGAN, reference, float32, R1 with a sum" not in page


def test_training_that_drifts_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.gpk, "wgan_generator_loss", lambda s: -s.mean() - 1e-4 * s.square().mean())
    monkeypatch.setattr(training, "N_CRITIC", 1)
    code, page = told(capsys, "--op", "training", "--dtype", "float64")
    assert code == 1
    assert "FAILED training of WGAN-GP" in page


class Own(nn.Module):
    """A user's critic."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_users_own_critic_is_verified(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "load_critic", lambda name: Own())
    code, page = told(capsys, "--critic", "mine:Own", "--input", "16x4")
    assert code == 0
    assert "eikonal" in page
    assert "12 cases, none failed" in page


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--op", "nonsense"], "--op: expected one of interpolate"),
        (["--dtype", "int8"], "--dtype: expected one of float64"),
        (["--backend", "nonsense"], "--backend: expected one of reference"),
        (["--critic", "torch.nn:ReLU"], "--critic and --input: expected both"),
        (["--critic", "torch.nn:ReLU", "--input", "8x4"], "torch.nn:ReLU on 8x4: "),
        (["--critic", "torch.nn:ReLU", "--input", f"{10**12}x{10**12}"], "torch.nn:ReLU on 10000"),
        (["--critic", "torch.nn:ReLU", "--input", "8x4", "--op", "interpolate"], "--op: expected without --critic"),
        (["--penalty", "m:f", "--json", "a.json"], ": expected without --penalty"),
        (["--critic", "math:sqrt", "--input", "8x4"], "--critic: expected a torch.nn.Module"),
        (
            ["--op", "interpolate", "--dtype", "float64", "--json", "/dev/null/all.json"],
            "--json /dev/null/all.json: Not a dir",
        ),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda x: x[0].lstrip("-") if isinstance(x, list) else x,
)
def test_a_mistake_is_one_line_and_two(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, *given]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert said in complaint


def test_a_backend_that_cannot_run_here_is_refused_with_its_cure(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["verify", "--backend", "cuda"]) == 2
    assert "GPKERNELS_BUILD=cuda" in capsys.readouterr().err
