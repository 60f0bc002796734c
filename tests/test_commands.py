"""The command line's info, and what every command says where it cannot run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpkernels as gpk
from gpkernels import backends, cli, info, ops
from gpkernels.ops.interpolate import interpolate_op
from installed import run

ROOT = Path(gpk.__file__).parent.parent
PATH = os.pathsep.join((str(ROOT), str(ROOT / "python")))


def test_info_prints_a_page_and_json_that_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert list(facts["ops"]) == sorted(ops.ALL)
    assert facts["ops"]["interpolate"]["cpu"] == backends.running("cpu")
    assert facts["running"]["cpu"] == backends.running("cpu")
    assert cli.main(["info"]) == 0
    page = capsys.readouterr().out
    for said in (
        torch.__version__,
        info.processor(),
        platform.platform(),
        "reference",
        "have run on an NVIDIA H200",
        *facts["ops"],
    ):
        assert said in page
    if facts["build"] is not None:
        assert set(facts["build"]) == {"torch", "compiler", "flags", "revision", "instruction_sets", "oldest_torch"}
        assert facts["build"]["compiler"] in page
        assert facts["build"]["revision"] in page
        assert facts["instruction_set"] in page


def test_info_says_reference_of_an_op_that_has_no_kernel_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.library._scoped_library("gpkernels", "FRAGMENT") as library:
        library.define("kernels_to_come(Tensor x) -> Tensor")
        library.impl("kernels_to_come", torch.clone, "CompositeExplicitAutograd")
        monkeypatch.setitem(ops.ALL, "kernels_to_come", interpolate_op)
        runs = info.facts()["ops"]
    assert runs["kernels_to_come"]["cpu"] == "reference"
    assert runs["interpolate"]["cpu"] == backends.running("cpu")


@pytest.mark.parametrize("arguments", [["nonsense"], [], ["info", "--nonsense"]], ids=str)
def test_a_wrong_command_is_two_and_no_traceback(arguments: list[str]) -> None:
    done = run("-m", "gpkernels", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("gpkernels")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["", "--json", "--kernels"], ids=["page", "json", "kernels"])
def test_a_reader_that_is_gone_is_no_traceback(option: str) -> None:
    command = f"{sys.executable} -m gpkernels info {option} | head -1; exit ${{PIPESTATUS[0]}}"
    own = {**os.environ, "PYTHONPATH": str(Path(gpk.__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], env=own, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_what_there_is_to_train_and_to_reproduce_is_listed_without_the_packages_for_it() -> None:
    absent = f"import sys; sys.modules.update(dict.fromkeys({cli.EXTRA}))\nfrom gpkernels import cli\n"
    for arguments, listed in ((["train", "--help"], "wgan-gp"), (["reproduce", "--list"], "dirac-gan")):
        done = run("-c", absent + f"sys.exit(cli.main({arguments}))", path=PATH)
        assert done.returncode == 0, done.stderr
        assert listed in done.stdout
        assert done.stderr.count("\n") == 1
        assert all(package in done.stderr for package in cli.EXTRA)


@pytest.mark.parametrize("package", [*cli.EXTRA, "gptrainer"])
def test_training_without_its_packages_is_one_line_and_two(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["train", "wgan-gp"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert package in said
    assert "pip install 'gpkernels[train]'" in said


def test_the_train_extra_lists_what_training_needs() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("train = "))
    called = {"sklearn": "scikit-learn", "PIL": "pillow", "ot": "POT"}
    assert {called.get(name, name) for name in cli.EXTRA} == set(json.loads(line.partition("=")[2]))


def test_info_prints_what_each_gpu_kernel_needs() -> None:
    page = run("-m", "gpkernels", "info", "--kernels")
    assert page.returncode == 0
    assert "gradient_norm_penalty: reduce_long_rows" in page.stdout
    assert "sm_90" in page.stdout
