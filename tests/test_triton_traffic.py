"""Bytes that the Triton kernels load and store, counted in Triton's interpreter, compared with the minimum."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from test_triton_interpreted import interpret
from triton_cases import Arguments, tensors_in

RUNS: dict[str, dict[str, int]] = {}
SHAPES = {"rows of 4096": (16, 4096), "odd rows": (11, 5003)}
OPS = (
    "interpolate",
    "gradient_norm_penalty, and backward",
    "consistency_term, and backward",
    "clip_weights_",
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def calls(rows: int, cols: int) -> dict[str, list[tuple[str, Arguments]]]:
    """Raw ops and their arguments by test."""
    x, y = torch.randn(rows, cols), torch.randn(rows, cols)
    s, t, per_row = torch.randn(rows, 1), torch.randn(rows, 1), torch.rand(rows)
    one = torch.tensor(1.0)
    return {
        "interpolate": [("interpolate", (x, y, per_row))],
        "gradient_norm_penalty, and backward": [
            ("gradient_norm_penalty", (x, 1.0, False, 1, 2.0)),
            ("gradient_norm_penalty_backward", (one, x, per_row)),
        ],
        "consistency_term, and backward": [
            ("consistency_term", (s, t, x, y, 0.1, 0.1)),
            ("consistency_backward", (one, s, t, x, y, per_row, per_row, True)),
        ],
        "clip_weights_": [("clip_weights_", ([x, y, s, torch.randn(1500)], 0.1))],
    }


def nbytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_in(value))


def least(op: str, arguments: Arguments, results: Any) -> int:
    """Each input read once, each output written once."""
    written = arguments[0] if op.endswith("_") else []
    return nbytes(arguments) + nbytes([results, written])


def counting(builder: Any, moved: list[int]) -> None:
    """Have the interpreter note the bytes of each access, which unmasked ones are too."""
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            size = args[0].get_element_ty().primitive_bitwidth // 8
            moved.append(int(args[mask_at].data.sum()) * size)
            return access(*args)

        return counted

    builder.create_masked_load, builder.create_masked_store = count(load, 1), count(store, 2)


def measure() -> dict[str, dict[str, int]]:
    """By shape and test: the bytes that moved, and the least that can."""
    from triton.runtime.interpreter import interpreter_builder

    from gpkernels.triton import KERNELS

    moved: list[int] = []
    counting(interpreter_builder, moved)
    found = {}
    for shape, (rows, cols) in SHAPES.items():
        for name, ops in calls(rows, cols).items():
            moved.clear()
            fewest = sum(least(op, arguments, KERNELS[op](*arguments)) for op, arguments in ops)
            found[f"{name}, {shape}"] = {"moved": sum(moved), "least": fewest}
    return found


def counts() -> dict[str, dict[str, int]]:
    """What another process counts, once."""
    if not RUNS:
        done = interpret(str(Path(__file__)))
        assert done.returncode == 0, done.stderr[-3000:]
        RUNS.update(json.loads(done.stdout))
    return RUNS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_kernel_moves_each_element_once(op: str, shape: str) -> None:
    found = counts()[f"{op}, {shape}"]
    assert found["least"] <= found["moved"] <= 1.05 * found["least"]


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(measure()))
