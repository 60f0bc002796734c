"""The report of a GPU: its parts run on a CPU, and what fails is recorded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu_report.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)


def test_a_dry_run_fills_a_report(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    chosen = [word for name in ("info", "tests", "verify", "bench ops", "programs") for word in ("--part", name)]
    done = report("--dry-run", *chosen, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["device"] == "dry run"
    results = {name: part["results"] for name, part in found["parts"].items()}
    assert list(results) == ["info", "tests", "verify", "bench ops", "programs"]
    assert results["info"]["torch"] == torch.__version__
    assert results["tests"]["failed"] == []
    assert results["tests"]["passed"] > 30
    assert results["verify"]["passed"] > 0
    assert results["verify"]["failed"] == []
    assert {row["peer"] for row in results["bench ops"]["rows"]} == {"gpkernels", "eager", "limit"}
    assert float(results["programs"][0]["eager_ms"]) > 0


def test_a_part_that_is_none_is_refused(tmp_path: Path) -> None:
    done = report("--dry-run", "--part", "nothing", "--out", str(tmp_path / "report.json"))
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [("--jobs", "0"), ("--jobs", "two"), ("--seconds", "0"), ("--seconds", "nan")])
def test_options_out_of_range_are_refused(option: tuple[str, str], tmp_path: Path) -> None:
    done = report("--dry-run", *option, "--out", str(tmp_path / "report.json"))
    assert done.returncode == 2
    assert f"argument {option[0]}: expected a" in done.stderr
    assert f"got {option[1]}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_parts_that_time_nothing_run_at_once_and_in_order(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = report(
        "--dry-run", "--jobs", "2", "--part", "programs", "--part", "verify", "--part", "info", "--out", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(json.loads(out.read_text())["parts"]) == ["info", "verify", "programs"]


def test_a_part_that_fails_is_recorded_with_its_output(tool: Any, tmp_path: Path) -> None:
    ends = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]
    record = tool.run(tool.Part("ends", ends), tmp_path)
    assert record["status"] == 3
    assert "what went wrong" in record["output"]
    silent = [sys.executable, "-c", "print('nothing written')"]
    assert tool.run(tool.Part("silent", silent, "nowhere.json", tool.read_json), tmp_path)["status"] == 1


def test_failed_tests_are_named(tool: Any, tmp_path: Path) -> None:
    suite = tmp_path / "test_two.py"
    suite.write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    part = tool.Part("tests", [*command, f"--junitxml={tmp_path / 'tests.xml'}"], "tests.xml", tool.read_tests)
    record = tool.run(part, tmp_path)
    assert record["status"] == 1
    (failed,) = record["results"].pop("failed")
    assert failed.endswith("test_two::test_wrong")
    assert record["results"] == {"passed": 1, "skipped": 0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(tmp_path: Path) -> None:
    done = report("--out", str(tmp_path / "report.json"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected a GPU" in done.stderr
    assert not list(tmp_path.iterdir())
