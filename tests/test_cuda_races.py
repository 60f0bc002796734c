"""Launches of the CUDA kernels are proved free of races and deadlocks, and seeded bugs are found."""

from __future__ import annotations

import pytest

import proved

pytestmark = pytest.mark.skipif(not proved.is_there(), reason="sentryward, nvcc or a C++ compiler is not installed")
KNOWN = proved.tracked()


def test_every_launch_is_in_the_table() -> None:
    assert [launch.key for launch in proved.launches()] == list(KNOWN)


def test_every_op_is_launched() -> None:
    from cases import raw_arguments
    from emulated import COMPOSED

    assert set(proved.arguments()) == {name for name in raw_arguments() if not name.startswith(COMPOSED)}


@pytest.mark.parametrize("key", KNOWN, ids=lambda key: f"{key[0]} {key[1].split('<')[0]} {key[2]}")
def test_the_verdict_is_that_of_the_table(key: tuple[str, ...]) -> None:
    (launch,) = (launch for launch in proved.launches() if launch.key == key)
    assert proved.verdict(launch, proved.module()) == KNOWN[key]


def test_a_launch_is_proved_or_has_branches_that_depend_on_memory_and_the_documentation_says_how_many() -> None:
    undecided = [verdict for verdict in KNOWN.values() if verdict != proved.PROVED]
    assert set(undecided) == {"undecided: control predicate not static", "undecided: control parameter value missing"}
    count = f"{len(KNOWN) - len(undecided)} of {len(KNOWN)}"
    for name in ("README.md", "docs/verifying.md"):
        assert f"{count} launches" in " ".join((proved.emulated.ROOT / name).read_text().split())


ROWS = "reduce_short_rows<32, PenaltyOfRow<float, float, 1, true>, float>"
BUGS = {
    "a missing barrier": (
        ("device.h", " = value;\n  __syncthreads();\n  value = A(0);", " = value;\n  value = A(0);"),
        ROWS,
        "potential_race",
    ),
    "an early exit before a barrier": (
        ("reduce_rows.h", "  double total = 0;\n", "  if (threadIdx.x >= 64) return;\n  double total = 0;\n"),
        ROWS,
        "not_wellsynced",
    ),
    "rows that are written on top of each other": (
        ("gradient_norm_penalty.cu", "store<T, kWidth>(out, row * packs + i", "store<T, kWidth>(out, row + i"),
        "scale_kernel<float, float, 1>",
        "potential_race",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_found(name: str) -> None:
    (file, old, new), kernel, finding = BUGS[name]

    def patch(source: str, text: str) -> str:
        assert source != file or old in text
        return text.replace(old, new) if source == file else text

    launch = next(launch for launch in proved.launches() if launch.kernel == kernel)
    assert proved.verdict(launch, proved.Module(proved.ptx("gradient_norm_penalty", patch))) == finding
