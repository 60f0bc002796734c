"""Registration of the available implementations of the ops; imported once, with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gpkernels import backends
from gpkernels.ops import ALL
from gpkernels.ops.op import LIBRARY


def triton_kernels() -> Mapping[str, Callable[..., Any]]:
    """Import Triton and return the launchers by raw op name."""
    from gpkernels.triton import KERNELS

    return KERNELS


def register_triton(library: torch.library.Library) -> None:
    """Register Triton kernels where "auto" selects them; they are imported when one is first called."""
    for device in backends.GPUS:
        if backends.takes_triton(device):
            for name in ALL:
                library.impl(name, _later(name), device.upper())


def _later(name: str) -> Callable[..., Any]:
    return lambda *args: triton_kernels()[name](*args)


backends.add_kernels("triton", triton_kernels)
register_triton(LIBRARY)
backends.bind_directly(ALL)
