"""The CUDA kernels under sanitizers and in other thread orders, and seeded bugs that these checks must detect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import emulated
from cases import raw_arguments
from gpkernels import ops
from shared import once

pytestmark = pytest.mark.skipif(
    emulated.compiler() is None or shutil.which("setarch") is None, reason="there is no C++ compiler, or no setarch"
)

CHECK = Path(__file__).parent / "emulation" / "check.py"
ORDERS = ("forward", "reverse", "random:1")
PENALTY = ("gradient_norm_penalty", "gradient_norm_penalty_backward")

Patch = Callable[[int, str, str], str]  # of the bug's number, a source's name and its text

RUNTIMES = {"plain": (), "sanitized": ("libasan.so", "libubsan.so"), "raced": ("libtsan.so",)}
# Whose blocks or warps share sums. One process cannot have so many threads as all kernels' grids.
SHARING = (
    "affine_gradients",
    "consistency_term",
    "gradient_norm_penalty",
    "lipschitz_consistency",
    "normalise_curvature",
    "relativistic_loss",
    "score_loss",
)


def _library_of_compiler(name: str) -> str:
    command = [str(emulated.compiler()), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class Job:
    """A check of some ops of a library, all of them if none are named, with at most one of the bugs it contains."""

    library: Path
    order: str
    names: tuple[str, ...] = ()
    bug: int = 0

    def as_json(self) -> dict[str, Any]:
        environment = {"GPK_EMULATION_ORDER": self.order, "GPK_EMULATION_BUG": str(self.bug)}
        return {"library": str(self.library), "ops": self.names, "environment": environment}


def verdicts(flavour: str, jobs: list[Job]) -> list[str]:
    """Return the result of each check: the last line of its output, or the sanitizer's finding."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["LD_PRELOAD"] = " ".join(map(_library_of_compiler, RUNTIMES[flavour]))
    environment["ASAN_OPTIONS"] = "detect_leaks=0:halt_on_error=1"
    environment["TSAN_OPTIONS"] = "halt_on_error=1"
    fixed = ["setarch", "-R"] if flavour == "raced" else []  # the race detector needs a fixed address space
    done = subprocess.run(
        [*fixed, sys.executable, str(CHECK), json.dumps([job.as_json() for job in jobs])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [_finding(*said) for said in json.loads(done.stdout)]


def _finding(code: int, output: str, errors: str) -> str:
    for line in errors.splitlines():
        if any(mark in line for mark in ("runtime error:", "ERROR: AddressSanitizer:", "WARNING: ThreadSanitizer:")):
            return line
    return output.splitlines()[-1] if output and not code else f"exit code {code}: {errors[-500:]}"


@pytest.mark.parametrize("flavour", RUNTIMES)
def test_the_kernels_compile_for_a_host(flavour: str) -> None:
    assert emulated.build(flavour).is_file()


@pytest.mark.parametrize("order", ORDERS)
def test_every_kernel_is_right_in_any_order_of_threads_and_blocks(order: str) -> None:
    assert _of_kernels("plain")[order] == "ok"


@pytest.mark.parametrize("order", ORDERS)
def test_every_kernel_is_clean_under_address_and_undefined_behaviour_sanitizers(order: str) -> None:
    assert _of_kernels("sanitized")[order] == "ok"


def test_no_two_threads_race() -> None:
    """One order suffices: the detector derives ordering from barriers, shuffles and fences, not from the schedule."""
    assert _of_kernels("raced") == {"random:1": "ok"}


# Launches of each op for a pair of tensors, where there are several.
ROWS = torch.zeros(3, 5)
LAUNCHES = {"consistency_backward": 2, "score_loss_backward": 2}


@pytest.mark.parametrize("name", sorted(name for name in ops.ALL if not name.startswith(emulated.COMPOSED)))
def test_an_op_is_one_launch(name: str) -> None:
    library = emulated.build()
    kernel = emulated.kernels(library)[name]
    for arguments in raw_arguments()[name]:
        before, sets = emulated.launches(library), emulated.memory_sets(library)
        kernel(*arguments)
        assert 1 <= emulated.launches(library) - before <= LAUNCHES.get(name, 1)
        assert emulated.memory_sets(library) - sets <= (name in SHARING)


@pytest.mark.parametrize("kind", [-1, 8])
def test_a_code_that_names_nothing_is_refused(kind: int) -> None:
    kernels = emulated.kernels(emulated.build())
    scores, one = torch.rand(3), torch.ones(())
    with pytest.raises(RuntimeError, match=f"kinds: expected 0 to 7, got {kind}"):
        kernels["score_loss"]([scores, scores], [0, kind], [0.0, 0.0])
    with pytest.raises(RuntimeError, match=f"kinds: expected 0 to 7, got {kind}"):
        kernels["score_loss_backward"](one, [scores], [kind], [0.0])
    with pytest.raises(RuntimeError, match=f"reduction: expected 0 to 2, got {kind}"):
        kernels["gradient_norm_penalty"](scores, 1.0, False, kind, 2.0)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("interpolate", (ROWS, torch.zeros(3, 4), torch.zeros(3)), r"fake: expected shape \(3, 5\), got \(3, 4\)"),
        ("interpolate", (ROWS, ROWS, torch.zeros(1, 3)), r"eps: expected shape \(N,\) or \(N, 1, ...\), got \(1, 3\)"),
        ("interpolate", (ROWS, ROWS.double(), torch.zeros(3)), "fake: expected dtype Float, got Double"),
        (
            "instance_noise",
            (ROWS, 1.0, None, torch.zeros(1), True),
            r"key: expected one int64, got Float of shape \(1,\)",
        ),
        ("mean_pool", (ROWS, 2, 2), r"x: expected images that windows of 2 x 2 tile, got shape \(3, 5\)"),
        (
            "consistency_term",
            (ROWS, ROWS, ROWS[:2], ROWS[:2], 0.0, 1.0),
            "features1: expected the batch of score1, 3, got 2",
        ),
        ("affine_gradients", (ROWS, ROWS), r"cotangent: expected shape \(R, K, I\), got \(3, 5\)"),
        ("clip_weights_", ([torch.zeros(1).expand(4)], 1.0), r"params: expected .* not overlap .* got shape \(4,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_kernels_of_both_devices_refuse_the_same_arguments(op: str, arguments: tuple[Any, ...], message: str) -> None:
    for kernel in (emulated.kernels(emulated.build())[op], ops.ALL[op].overload):
        with pytest.raises(RuntimeError, match=message):
            kernel(*arguments)


def test_hundreds_of_weights_are_one_launch() -> None:
    library = emulated.build()
    kernels = emulated.kernels(library)
    weights, gradients, squares = ([torch.rand(1 + i % 7) for i in range(500)] for _ in range(3))
    before = emulated.launches(library)
    kernels["clip_weights_"](weights, 0.1)
    kernels["rmsprop_"](weights, gradients, squares, [], [], 1e-2, 0.9, 1e-8, 0.0, 0.0, False, 0.05)
    assert emulated.launches(library) - before == 2
    assert max(float(w.abs().max()) for w in weights) <= float(torch.tensor(0.05))


@cache
def _traffic() -> dict[str, float]:
    command = [sys.executable, str(CHECK.with_name("traffic.py")), str(emulated.build("counted"))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


STREAMING = (
    "clip_weights_",
    "consistency_backward",
    "consistency_term",
    "gradient_norm_penalty",
    "gradient_norm_penalty_backward",
    "interpolate",
    "interpolate_backward",
    "relativistic_loss",
    "relativistic_loss_backward",
)


@pytest.mark.parametrize("name", STREAMING)
def test_elements_are_read_once_and_written_once(name: str) -> None:
    """Counted, within 5 % of the least: what a row shares, such as its eps, each warp asks for."""
    assert 1.0 <= _traffic()[name] <= 1.05


def _replace(file: str, old: str, new: str) -> Patch:
    def patch(number: int, name: str, text: str) -> str:
        if name != file:
            return text
        assert old in text, f"{file} has changed: {old!r} is not in it"
        return text.replace(old, new.replace("SEEDED", f"emulation::seeded({number})"))

    return patch


_NO_BARRIER = _replace(
    "device.h",
    " = value;\n  __syncthreads();\n  value = A(0);",
    " = value;\n  if (!SEEDED) __syncthreads();\n  value = A(0);",
)
# Each bug, which acts where it is SEEDED; the build that detects it; and its message: a plain build in every order, the
# others in one.
BUGS: dict[str, tuple[Patch, str, str]] = {
    "a missing barrier": (_NO_BARRIER, "plain", "wrong value"),
    "a wrong stride": (
        _replace(
            "gradient_norm_penalty.cu",
            "load<T, kWidth>(x, row * packs + i)",
            "load<T, kWidth>(x, (SEEDED ? row : row * packs) + i)",
        ),
        "plain",
        "wrong value",
    ),
    "an early exit before a barrier": (
        _replace(
            "reduce_rows.h",
            "  double total = 0;\n",
            "  if (SEEDED && threadIdx.x > 40) return;\n  double total = 0;\n",
        ),
        "plain",
        "a shuffle reads a lane that does not take part",
    ),
    "a shuffle in part of a warp": (
        _replace(
            "reduce_rows.h",
            "for (A& sum : sums) sum = lanes",
            "for (A& sum : sums) if (!SEEDED || lane < 16) sum = lanes",
        ),
        "plain",
        "deadlock",
    ),
    "a tail that is not masked": (
        _replace("gradient_norm_penalty.cu", "i < packs; i += step", "i < packs + SEEDED; i += step"),
        "sanitized",
        "heap-buffer-overflow",
    ),
    "a wide load that is misaligned": (
        _replace(
            "device.h", "% kWide<T> == 0 && aligned(pointers)", "% kWide<T> == 0 && (SEEDED || aligned(pointers))"
        ),
        "sanitized",
        "misaligned address",
    ),
    "shared memory that is too small": (
        _replace(
            "device.h",
            "template <typename A>\n__device__ __forceinline__ A block_sum(A value) {\n"
            "  GPK_SHARED(A, sums, kThreads / kWarp);\n",
            "template <typename A, int kSums = 0>\n__device__ __forceinline__ A block_sum(A value) {\n"
            "  constexpr int kRight = kThreads / kWarp;\n"
            "  if constexpr (!kSums) return SEEDED ? block_sum<A, kRight - 1>(value) : block_sum<A, kRight>(value);\n"
            "  GPK_SHARED(A, sums, kSums ? kSums : 1);\n",
        ),
        "sanitized",
        "out of bounds",
    ),
    "a sum that blocks add to without atomics": (
        _replace(
            "reduce_rows.h",
            "if (threadIdx.x == 0) partials[(row * tiles + blockIdx.x) * Row::kSums + k] = sum;",
            "A& total = partials[(row * tiles + (SEEDED ? 0 : blockIdx.x)) * Row::kSums + k];"
            "if (threadIdx.x == 0) total = !SEEDED || blockIdx.x == 0 ? sum : total + sum;",
        ),
        "raced",
        "data race",
    ),
    "a ticket that is not atomic": (
        _replace(
            "device.h",
            "atomicAdd(ticket, 1u) == blocks - 1",
            "(SEEDED ? (*ticket)++ : atomicAdd(ticket, 1u)) == blocks - 1",
        ),
        "raced",
        "data race",
    ),
    "a missing fence": (
        _replace("device.h", "    __threadfence();\n    last[0] =", "    if (!SEEDED) __threadfence();\n    last[0] ="),
        "raced",
        "data race",
    ),
    "a missing barrier that the order of threads hides": (_NO_BARRIER, "raced", "data race"),
}
NO_BUG = "no bug"


def _with_bugs(flavour: str) -> Path:
    """Build a library of one source with all bugs that a flavour detects, of which a check chooses one or none."""
    patches = [(i, patch) for i, (patch, detector, _) in enumerate(BUGS.values(), 1) if detector == flavour]

    def patched(name: str, text: str) -> str:
        for number, patch in patches:
            text = patch(number, name, text)
        return text

    return emulated.build(flavour, patched, only="gradient_norm_penalty")


@cache
def _of_kernels(flavour: str) -> dict[str, str]:
    """By order: what the check of a flavour's kernels says."""

    def check() -> dict[str, str]:
        library, names = emulated.build(flavour), SHARING if flavour == "raced" else ()
        orders = ORDERS[2:] if flavour == "raced" else ORDERS
        return dict(zip(orders, verdicts(flavour, [Job(library, order, names) for order in orders]), strict=True))

    return once(f"emulated_kernels_{flavour}", check)


@cache
def _of_bugs(flavour: str) -> dict[str, dict[str, str]]:
    """By bug that a flavour detects, or NO_BUG, and by order: what the check says."""

    def check() -> dict[str, dict[str, str]]:
        library, orders = _with_bugs(flavour), ORDERS if flavour == "plain" else ORDERS[:1]
        numbers = {bug: i for i, (bug, (_, detector, _)) in enumerate(BUGS.items(), 1) if detector == flavour}
        jobs = {(bug, order): Job(library, order, PENALTY, i) for bug, i in numbers.items() for order in orders}
        jobs[NO_BUG, orders[0]] = Job(library, orders[0], PENALTY[: 1 if flavour == "raced" else 2])
        found: dict[str, dict[str, str]] = {}
        for (bug, order), said in zip(jobs, verdicts(flavour, [*jobs.values()]), strict=True):
            found.setdefault(bug, {})[order] = said
        return found

    return once(f"emulated_bugs_{flavour}", check)


@pytest.mark.parametrize("bug", BUGS)
def test_the_checks_see(bug: str) -> None:
    _, flavour, message = BUGS[bug]
    found = _of_bugs(flavour)[bug]
    assert all(message in said for said in found.values()), found


@pytest.mark.parametrize("flavour", RUNTIMES)
def test_the_checks_see_nothing_where_no_bug_acts(flavour: str) -> None:
    assert set(_of_bugs(flavour)[NO_BUG].values()) == {"ok"}
