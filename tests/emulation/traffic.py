"""Count the bytes that emulated kernels move: `python traffic.py LIBRARY` prints them for each op as JSON.

A process of its own, as another library of kernels may be loaded in the test's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import emulated

Arguments = tuple[Any, ...]


def _rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(64, 3000).to(dtype)


def _per_row() -> Tensor:
    return torch.rand(64)


# Arguments, and which bytes must move: those of a matrix, as often as one is read and written.
STREAMS: dict[str, tuple[Callable[[], Arguments], int, int]] = {
    "interpolate": (lambda: (_rows(), _rows(), _per_row()), 2, 1),
    "interpolate_backward": (lambda: (_rows(), _per_row(), True, True), 1, 2),
    "gradient_norm_penalty": (lambda: (_rows(), 1.0, False, 1, 2.0), 1, 0),
    "gradient_norm_penalty_backward": (lambda: (torch.tensor(0.7), _rows(), _per_row()), 1, 1),
    "consistency_term": (lambda: (_rows()[:, :1], _rows()[:, :1], _rows(), _rows(), 0.1, 0.1), 2, 0),
    "consistency_backward": (
        lambda: (torch.tensor(0.7), *[_rows()[:, :1]] * 2, _rows(), _rows(), _per_row(), _per_row(), True),
        2,
        2,
    ),
    "relativistic_loss": (lambda: (_rows(), _rows()), 2, 0),
    "relativistic_loss_backward": (lambda: (torch.tensor(0.7), _rows(), _rows()), 2, 2),
    "clip_weights_": (lambda: ([*_rows().split([3, 60, 1])], 0.1), 1, 1),
}


def moved(name: str, kernel: Callable[..., Any], library: Path) -> float:
    """Bytes read and written, over the least that could be."""
    arguments, reads, writes = STREAMS[name]
    given = arguments()
    before = emulated.traffic(library)
    kernel(*given)
    total = sum(emulated.traffic(library)) - sum(before)
    return total / ((reads + writes) * 64 * 3000 * 4)


def main() -> None:
    library = Path(sys.argv[1])
    kernels = emulated.kernels(library)
    print(json.dumps({name: moved(name, kernels[name], library) for name in STREAMS}))


if __name__ == "__main__":
    main()
