"""Duplicated facts agree: tables of GPU kernels and their sources, kinds of score losses in Python and C++.

Where the compilers are available, test_cuda_compiles and test_triton_compiles check every number of the tables.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from compiled import ARCHITECTURES, SOURCES
from gpkernels.ops.score_loss import ScoreLoss

ROOT = Path(__file__).parents[1]


def _column(table: str, *columns: str) -> set[tuple[str, ...]]:
    with (ROOT / "gpkernels" / table).open(newline="") as file:
        return {tuple(row[column] for column in columns) for row in csv.DictReader(file)}


def _kernels(path: Path) -> set[str]:
    """Names of CUDA kernels, or of Triton's, that a source defines."""
    return set(re.findall(r"__global__ void GPK_BOUNDS (\w+)|^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))


def test_an_op_has_a_file_of_its_stem_in_every_folder() -> None:
    shared = {
        "__init__",
        "attention_blocks",
        "attention_tiles",
        "checks",
        "common",
        "differentiable",
        "functions",
        "op",
        "philox",
        "tensors",
    }
    of_pytorchs_calls = {"scaled_dot_product_attention", "grid_sample"}  # in C++ and CUDA
    folders = ("gpkernels/ops/*.py", "gpkernels/triton/*.py", "csrc/cpu/*.cpp", "csrc/cuda/*.cu")
    stems = [{path.stem for path in ROOT.glob(folder)} - shared for folder in folders]
    assert of_pytorchs_calls < stems[0]
    assert all(found | of_pytorchs_calls == stems[0] for found in stems)


def test_the_table_of_cuda_kernels_lists_those_of_the_sources_for_every_architecture() -> None:
    over_rows = {name for name, _ in _kernels(ROOT / "csrc" / "cuda" / "reduce_rows.h")}
    names = {(source.stem, name) for source in SOURCES for name, _ in _kernels(source)}
    sums = {source.stem for source in SOURCES if re.search(r"struct \w+Of\w+ \{", source.read_text())}
    names |= {(stem, name) for stem in sums for name in over_rows}
    targets = [f"sm_{a}" for a in ARCHITECTURES]
    expected = {(f"{stem}: {name}", target) for stem, name in names for target in targets}
    assert len(over_rows) == 2
    assert _column("cuda_kernels.csv", "kernel", "target") == expected


def test_the_table_of_triton_kernels_lists_those_of_the_sources() -> None:
    sources = (ROOT / "gpkernels" / "triton").glob("*.py")
    expected = {name for source in sources for _, name in _kernels(source)}
    assert {name for (name,) in _column("triton_kernels.csv", "kernel")} == expected


def test_kinds_of_score_losses_are_those_of_the_kernels() -> None:
    found = re.search(r"enum class ScoreLoss : int64_t \{([^}]*)\}", (ROOT / "csrc" / "formulas.h").read_text())
    assert found
    names = [name.strip() for name in found[1].split(",")]
    assert names == [kind.name.lower() for kind in ScoreLoss]
    assert [int(kind) for kind in ScoreLoss] == list(range(len(ScoreLoss)))
