"""Registration of the available implementations of the ops; imported once, with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpkernels import backends
from gpkernels.ops import ALL
from gpkernels.ops.op import LIBRARY


def triton_kernels() -> Mapping[str, Callable[..., Any]]:
    """Import Triton and return the launchers by raw op name."""
    from gpkernels.triton import KERNELS

    return KERNELS


def _later(name: str) -> Callable[..., Any]:
    """Import Triton when the kernel is first called."""
    return lambda *args: triton_kernels()[name](*args)


backends.add_kernels("triton", triton_kernels)
backends.register_triton(LIBRARY, ALL, _later)
backends.bind_directly(ALL)
