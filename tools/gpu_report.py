"""Run all that needs a GPU and write one file of results, to be committed under bench/results.

Parity of every op, graph capture and compiled steps (tests/test_gpu.py), compute-sanitizer where it is installed, the
verification of every backend, launches of steps, times of ops, critic steps and attention, and programs such as R3GAN's
critic beside their own formulas. A part that fails is recorded and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from gpkernels.arguments import count, duration

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = "tests/test_gpu.py"
NEED_NO_GPU = "small_critics"  # tests of that file
SANITIZERS = {
    "memcheck": "raw_op",
    "racecheck": "raw_op",
    "initcheck": "raw_op",
    "memcheck of steps": "is_that_of_the_cpu",
}
TAIL = 4000  # characters kept of the output of a part that fails
Reader = Callable[[Path], Any]


class Part(NamedTuple):
    """A command, the file that it writes and how that is read; or the reason why the part is left out.

    times: it measures times, so nothing else may run.
    """

    name: str
    command: Sequence[str]
    file: str = ""
    read: Reader | None = None
    left_out: str = ""
    times: bool = False


def read_json(path: Path) -> Any:
    """Read what a command of gpkernels wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a table as a row for each line below the first."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_tests(path: Path) -> dict[str, Any]:
    """Count a test run's outcomes; name the tests that failed."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def parts(folder: Path, device: str, dry: bool, jobs: int = 1, seconds: float | None = None) -> list[Part]:
    """Return the parts of a report. dry: the smallest of each, on a CPU; jobs: processes of the tests."""
    cli = [sys.executable, "-m", "gpkernels"]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", GPU_TESTS]
    some = [*(["-k", NEED_NO_GPU] if dry else []), *(["-n", str(jobs)] if jobs > 1 else [])]
    seconds = 0.01 if dry else seconds

    def lasts(factor: float) -> list[str]:
        return ["--seconds", str(factor * seconds)] if seconds else []

    bench = [*cli, "bench", "--device", device, *lasts(1), *(["--quick"] if dry else [])]
    found = [
        Part("info", [*cli, "info", "--json"], "stdout", read_json),
        Part("tests", [*tests, *some, f"--junitxml={folder / 'tests.xml'}"], "tests.xml", read_tests),
    ]
    tool = shutil.which("compute-sanitizer")
    for name, chosen in SANITIZERS.items():
        command = [tool or "", "--tool", name.split()[0], "--error-exitcode", "1", *tests, "-k", chosen]
        found.append(Part(f"compute-sanitizer {name}", command, left_out="" if tool else "it is not installed"))
    choice = ["--quick", "--op", "interpolate"] if dry else []
    found.append(
        Part("verify", [*cli, "verify", *choice, "--json", str(folder / "verify.json")], "verify.json", _verified)
    )
    launches = [sys.executable, str(ROOT / "bench" / "launches.py"), *([] if dry else ["--measured"])]
    found.append(Part("launches", [*launches, "--csv", str(folder / "launches.csv")], "launches.csv", read_rows))
    for suite, case in (("ops", "interpolate, small"), ("steps", "MLP"), ("attention", "derivatives")):
        only = ["--case", case] if dry else []
        only += ["--peers", "eager,jvp_flash_attention"] if suite == "attention" else []
        file = f"{suite}.json"
        command = [*bench, suite, *only, "--json", str(folder / file)]
        found.append(Part(f"bench {suite}", command, file, read_json, times=True))
    programs = [sys.executable, str(ROOT / "bench" / "programs.py"), "--device", device, *lasts(10)]
    if dry:
        programs += ["--program", "CTGAN critic, N 500"]
    command = [*programs, "--csv", str(folder / "programs.csv")]
    found.append(Part("programs", command, "programs.csv", read_rows, times=True))
    return found


def _verified(path: Path) -> dict[str, Any]:
    """Count the checks of a verification; keep those that failed."""
    rows = read_json(path)["results"]
    failed = [row for row in rows if not row["ok"]]
    return {"passed": len(rows) - len(failed), "failed": failed}


def run(part: Part, folder: Path) -> dict[str, Any]:
    """Run a part and return its record."""
    if part.left_out:
        return {"left_out": part.left_out}
    start = time.perf_counter()
    done = subprocess.run(part.command, cwd=ROOT, capture_output=True, text=True, check=False)
    record: dict[str, Any] = {"status": done.returncode, "seconds": round(time.perf_counter() - start, 1)}
    if part.file == "stdout":
        (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    if part.read is not None and (folder / part.file).is_file():
        record["results"] = part.read(folder / part.file)
    elif part.read is not None:
        record["status"] = done.returncode or 1
    if record["status"]:
        record["output"] = (done.stdout + done.stderr)[-TAIL:]
    return record


def main() -> int:
    """Write the report; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="the smallest part of each, on the CPU")
    names = [part.name for part in parts(Path(), "cpu", dry=True)]
    parser.add_argument("--part", action="append", choices=names, metavar="NAME", help="run this one (default: all)")
    parser.add_argument(
        "--jobs", type=count, default=1, metavar="N", help="run up to N of the parts that time nothing at once"
    )
    parser.add_argument(
        "--seconds", type=duration, metavar="S", help="seconds per call of a case; a program takes ten times that"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/DEVICE-report.json")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_report: expected a GPU that PyTorch sees, got none; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    device = os.environ["GPK_TEST_DEVICE"] = "cpu" if options.dry_run else "cuda"
    name = "dry run" if options.dry_run else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = options.out or ROOT / "bench" / "results" / f"{slug}-report.json"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "parts": {}}
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        known = parts(folder, device, options.dry_run, options.jobs, options.seconds)
        wanted = [part for part in known if not options.part or part.name in options.part]
        for times, jobs in ((False, options.jobs), (True, 1)):
            some = [part for part in wanted if part.times == times]
            with ThreadPoolExecutor(jobs) as pool:
                running = [pool.submit(run, part, folder) for part in some]
                for part, record in zip(some, running, strict=True):
                    report["parts"][part.name] = found = record.result()
                    said = found.get("left_out") or f"status {found['status']}, {found['seconds']} s"
                    print(f"{part.name:<32}  {said}", flush=True)
                    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # kept if a later part ends
    print(out)
    return int(any(record.get("status") for record in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
