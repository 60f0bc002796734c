"""Which implementation of an op runs, and why.

"auto" leaves the choice to PyTorch's dispatcher: an extension's kernel for the tensors' device type where one is
registered, otherwise the reference. A forced backend that cannot run raises on the first call, with the cure; importing
never fails because of a backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpkernels.ops import Op

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
_forced: str | None = None
extension: Any = None
extension_error: str | None = None


def load_extension() -> None:
    """Load the native kernels; a failure is kept for ``info`` and for a forced backend's message."""
    global extension, extension_error
    try:
        from gpkernels import _C  # type: ignore[attr-defined]
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        missing = "cannot import name '_C'" in reason
        extension_error = "the package was built without it" if missing else reason
    else:
        extension = _C


def set_backend(name: str) -> None:
    """Choose the backend of every later op: "auto", "reference", "cpu", "triton" or "cuda".

    Raises ValueError for another name. The environment variable GPKERNELS_BACKEND sets the first choice.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    _forced = None if name == "auto" else name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``set_backend`` for a while."""
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before or "auto")


def forced() -> str | None:
    """The forced backend's name, or None under "auto"."""
    return _forced


def unavailable(name: str) -> str | None:
    """Why a backend cannot run here, with the cure; None if it can."""
    if name == "cpu" and extension is None:
        return (
            f"the C++ kernels are not loaded ({extension_error}); build them with a C++20 compiler: "
            "pip install --no-build-isolation -e ."
        )
    if name in ("cuda", "triton"):
        return f"this version has no {name} kernels; use backend 'auto'"
    return None


def implementation(op: Op, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The forced backend's implementation of an op for these arguments; RuntimeError where it cannot run."""
    if _forced == "reference":
        return op.implementation
    reason = unavailable(_forced or "auto")
    device = _device(args)
    if reason is None and device.type != _forced:
        reason = f"it runs on {_forced} tensors, got {device.type} tensors; use backend 'auto'"
    if reason is not None:
        raise RuntimeError(f"backend {_forced!r} was forced, but {op.name} cannot run on it: {reason}")
    return op.overload


def running(device_type: str) -> str:
    """The backend that "auto" takes for a device type."""
    return "cpu" if device_type == "cpu" and extension is not None else "reference"


def _device(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0].device
    return torch.device("cpu")


def _from_environment() -> None:
    name = os.environ.get("GPKERNELS_BACKEND", "auto")
    if name in NAMES:
        set_backend(name)
    else:
        import warnings

        warnings.warn(
            f"GPKERNELS_BACKEND: expected one of {', '.join(NAMES)}, got {name!r}; using 'auto'", stacklevel=2
        )


load_extension()
_from_environment()
