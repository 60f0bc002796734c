"""The Triton kernels in Triton's interpreter, compared with the reference, and next to inaccessible pages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import triton_cases
from gpkernels import ops
from shared import once

TESTS = Path(__file__).parent
NAMES = [(op, name) for name, op, _ in triton_cases.cases()]
PAIRS = sorted({(op, name.partition(" of ")[2].split()[0].rstrip(",")) for op, name in NAMES})
GUARDS = ("guarded-start", "guarded-end")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

UNMASKED = """
import sys
import torch, triton, triton.language as tl
from guarded import guarded

@triton.jit
def copy(x, y, count, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count) if MASKED else tl.load(x + at)
    tl.store(y + at, value, mask=at < count)

x, y = guarded(torch.randn(10), at_end=True), guarded(torch.zeros(10), at_end=True)
copy[(1,)](x, y, 10, BLOCK=16, MASKED=sys.argv[1] == "masked")
assert torch.equal(x, y)
"""


def interpret(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    environment.pop("GPKERNELS_BACKEND", None)
    environment["OMP_NUM_THREADS"] = "1"  # small tensors, and several processes at once
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@cache
def cases(part: str) -> dict[str, list[str]]:
    """(worst error, share of what it may be) of each case of a dtype or guard, which a process runs once."""

    def run() -> tuple[int, str, str]:
        done = interpret(str(TESTS / "triton_cases.py"), part)
        return done.returncode, done.stdout, done.stderr

    code, out, err = once(f"triton_interpreted_{part}", run)
    assert code == 0, (code, err[-3000:])  # after a crash the last line of stderr names the case
    return json.loads(out)


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_kernel_gives_the_references_numbers_shapes_and_strides(op: str, dtype: str) -> None:
    found = cases(dtype)
    names = [name for own, name in NAMES if own == op and name.partition(" of ")[2].startswith(dtype)]
    wrong = {name: found[name] for name in names if not float(found[name][1]) <= 1.0}
    assert not wrong


@pytest.mark.parametrize("guard", GUARDS)
def test_kernels_touch_no_memory_but_their_tensors(guard: str) -> None:
    found = cases(guard)
    assert {name.partition(" ")[0] for name in found} == {op for op, _ in NAMES}
    assert all(float(share) <= 1.0 for _, share in found.values())


@pytest.mark.parametrize(("mask", "dies"), [("masked", False), ("unmasked", True)])
def test_a_forbidden_page_kills_an_unmasked_kernel_and_no_other(mask: str, dies: bool, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(UNMASKED)
    done = interpret(str(program), mask)
    assert (done.returncode < 0) == dies, done.stderr
    assert dies or done.returncode == 0, done.stderr


def test_uniform_numbers_are_the_references_to_the_last_bit() -> None:
    assert all(
        float(v[0]) <= 1e-16 for name, v in cases("float64").items() if name.startswith("instance_noise 2 of float64")
    )


def test_launchers_have_cases_and_refuse_shapes_that_would_read_out_of_bounds() -> None:
    done = interpret(str(TESTS / "triton_cases.py"), "refusals")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found["kernels"]) == set(ops.ALL)
    assert set(PAIRS) == {(op, dtype) for op in ops.ALL for dtype in triton_cases.DTYPES}
    assert found["raised"] == dict.fromkeys(found["raised"], "RuntimeError")


def test_importing_the_library_imports_no_triton() -> None:
    script = "import sys, gpkernels; assert not [m for m in sys.modules if m.startswith('gpkernels.triton')]"
    assert interpret("-c", script).returncode == 0
