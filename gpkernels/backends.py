"""Choice of the implementation of each op, and the reason for it.

"auto" leaves the choice to PyTorch's dispatcher: a native kernel where an op has one for the device type, on GPUs
otherwise a Triton kernel where Triton is installed, otherwise the reference. A forced backend that cannot run raises at
the first call and names the remedy. Importing never fails because of a backend, and does not import Triton.

``set_backend`` sets the backend of the process, ``backend`` that of the current thread or async task.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import get_ident, local
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.private import carried, carry, has_kernel, is_carried, xpu_is_built
from gpkernels.version import OLDEST_TORCH

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
FOLDER = Path(__file__).parent
CUDA_LIBRARY = FOLDER / "_cuda.so"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall --no-binary gpkernels gpkernels"
GPUS = ("cuda", "xpu")  # device types; "cuda" includes ROCm
NOT_BUILT = "the package was built without it"
_everywhere = "auto"  # set by set_backend
_chosen: ContextVar[str] = ContextVar("gpkernels.backend")  # set by backend
_CARRIED = "gpkernels.backend"  # key of the choice in PyTorch's thread-local state
_tables: dict[str, Callable[[], Mapping[str, Callable[..., Any]]]] = {}
_by_triton: set[tuple[str, str]] = set()  # names of ops and device types where "auto" selects Triton kernels
# Of each op: without a graph and with one.
_fast_paths: list[tuple[Op, Callable[..., Any], Callable[..., Any]]] = []


class Op(Protocol):
    """The attributes of an op that this module uses."""

    name: str
    implementation: Callable[..., Any]
    overload: Any
    direct: Callable[..., Any]
    recorded: Callable[..., Any]
    derivative: Any


def declined(*args: Any) -> Any:
    """Placeholder for a missing fast path; always returns NotImplemented."""
    return NotImplemented


extension: Any = None
# (op name, variable with the thread's backend, whether it has a CUDA kernel[, derivative]) -> fast path of the op
direct: Callable[..., Callable[..., Any]] | None = None
deliver: Callable[..., Any] = declined  # (value, gradients, tensors): C++ twin of critic/deliver.py
draw_key: Callable[..., Any] = declined  # (): the next key of PyTorch's generator of the CPU
program: Any = None  # _program: runs programs and reads autograd's graph
extension_error: str | None = None
fast_path_error: str | None = "there are no C++ kernels"  # None once both modules of fast paths are loaded
cuda_error: str | None = "the package was built without them"  # None once they are loaded


# --- loading ----------------------------------------------------------------------------------------------------------


def load_extension() -> None:
    """Load the native kernels; keep the error for ``info`` and for the message of a forced backend.

    A binary that is there and cannot be used costs time, so that is a warning, too.
    """
    global extension, extension_error, fast_path_error, cuda_error
    try:
        extension = importlib.import_module("gpkernels._C")
    except ModuleNotFoundError:
        extension_error = _why_not_found()
    except (ImportError, OSError, RuntimeError) as error:
        extension_error = f"{_line(error)}; it is for PyTorch {OLDEST_TORCH} or later, and this is {torch.__version__}"
    else:
        extension_error = None
        fast_path_error = _load_fast_paths()
    if extension_error not in (None, NOT_BUILT):
        warnings.warn(
            f"the C++ kernels of gpkernels are not loaded: {extension_error}. Ops run on the reference, which is "
            f"slower. To build them: GPKERNELS_BUILD=cpu {REBUILD}",
            stacklevel=2,
        )
    elif extension is not None and fast_path_error is not None:
        warnings.warn(
            f"the fast paths of gpkernels are not loaded: {fast_path_error}. Results are the same; small ops and steps "
            f"of small critics are slower. To build them for this PyTorch: GPKERNELS_BUILD=cpu {REBUILD}",
            stacklevel=2,
        )
    if CUDA_LIBRARY.exists():
        try:
            torch.ops.load_library(str(CUDA_LIBRARY))
            cuda_error = None
        except (OSError, RuntimeError) as error:
            cuda_error = _line(error)


def _load_fast_paths() -> str | None:
    """Load the modules for one release of PyTorch; return the reason if one of them is missing."""
    global direct, deliver, draw_key, program
    built = extension.build_info()["torch"]
    if not same_release(built, torch.__version__):  # loading them would not even be safe
        return f"they are for PyTorch {built}, and this is {torch.__version__}"
    reasons, modules = [], {}
    for name in ("_direct", "_program"):
        try:
            module = importlib.import_module(f"gpkernels.{name}")
        except ModuleNotFoundError:
            reasons.append(f"the package was built without {name}")
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(_line(error))
        else:
            if same_release(module.TORCH, torch.__version__):
                modules[name] = module
            else:
                reasons.append(f"{name} is for PyTorch {module.TORCH}, and this is {torch.__version__}")
    if "_direct" in modules:
        module = modules["_direct"]
        direct, deliver, draw_key = module.direct, module.deliver, module.draw_key
    program = modules.get("_program")
    return "; ".join(reasons) or None


def same_release(one: str, other: str) -> bool:
    """Whether two versions of PyTorch have the same C++ interface, as builds of a release for different devices have.

    Builds from source and nightly builds have it only if they are the same build.
    """
    releases = [re.fullmatch(r"(\d+\.\d+\.\d+)(\+(cpu|cu\d+|rocm[\d.]+|xpu))?", version) for version in (one, other)]
    return one == other or (None not in releases and len({found and found[1] for found in releases}) == 1)


def _why_not_found() -> str:
    """Return why there is no module of kernels for this Python."""
    others = sorted(path.name for path in FOLDER.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if not others:
        return NOT_BUILT
    return f"{others[0]} is for another Python or system: this one loads _C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(device_type: str) -> bool:
    """Whether Triton kernels can run on a device type. Queries how PyTorch was built, not the device."""
    built = {"cuda": torch.backends.cuda.is_built(), "xpu": xpu_is_built()}
    return built.get(device_type, False) and has_triton()


def register_triton(library: torch.library.Library, names: Iterable[str], kernel: Callable[[str], Any]) -> None:
    """Register Triton kernels on GPUs, for the ops without a native kernel there."""
    for device in GPUS:
        if takes_triton(device):
            for name in names:
                if not has_kernel(f"{library.ns}::{name}", device.upper()):
                    library.impl(name, kernel(name), device.upper())
                    _by_triton.add((name, device))


def bind_directly(ops: Mapping[str, Op]) -> None:
    """Bind the fast path of each op with a C++ kernel; ``set_backend`` enables and disables them."""
    if direct is not None:
        on_gpus = cuda_error is None
        _fast_paths.extend(
            (op, direct(f"gpkernels::{name}", _chosen, on_gpus), _recorded(name, op, on_gpus))
            for name, op in ops.items()
            if running_op(name, "cpu") == "cpu"
        )
    _update_fast_paths()


def _recorded(name: str, op: Op, on_gpus: bool) -> Callable[..., Any]:
    if direct is None or op.derivative is None:
        return declined
    return direct(f"gpkernels::{name}", _chosen, on_gpus, (*op.derivative, lambda: _everywhere))


def _update_fast_paths() -> None:
    """Enable the fast paths where the process-wide backend selects the C++ and CUDA kernels.

    In a thread with a backend of its own they decline by themselves: they read its choice.
    """
    taken = _everywhere == "auto" or (_everywhere == "cpu" and cuda_error is not None)
    for op, plain, recorded in _fast_paths:
        op.direct, op.recorded = (plain, recorded) if taken else (declined, declined)


# --- choosing ---------------------------------------------------------------------------------------------------------


class _Own:
    """``name``: backend chosen by the current thread or async task; this object where there is none.

    The getter is in C, so that ``torch.compile`` reads it and guards on the value; it cannot trace a ``ContextVar``.
    """

    name = property(_chosen.get)  # get's argument is its default: here the object


class _Traced(local):
    """``name``: backend chosen by code that ``torch.compile`` is tracing, with no effect outside the trace."""

    def __init__(self) -> None:  # once per thread: an instance attribute, as tracing needs
        self.name: str | None = None


_own, _traced = _Own(), _Traced()


def _check(name: str) -> None:
    if not isinstance(name, str) or (name not in NAMES and name not in _tables):
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


def set_backend(name: str) -> None:
    """Set the backend of every later op in this process.

    A thread or async task inside :func:`backend` keeps its own choice. The environment variable ``GPKERNELS_BACKEND``
    sets the initial value.

    Args:
        name (str): ``"auto"`` leaves the choice to PyTorch's dispatcher: the fastest kernel that is registered for the
            device of the arguments. ``"reference"``, ``"cpu"``, ``"triton"`` and ``"cuda"`` force a backend.

    Raises:
        ValueError: ``name`` is not a backend. A backend that cannot run raises RuntimeError at the first call of an op.

    Example:
        >>> gpkernels.set_backend("reference")
        >>> gpkernels.set_backend("auto")
    """
    global _everywhere
    _check(name)
    _everywhere = name
    _update_fast_paths()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager that forces a backend in the current thread or async task, whatever :func:`set_backend` chose.

    Backward passes that are started inside use the same backend. Threads that are started inside do not inherit it.

    Args:
        name (str): a backend, as in :func:`set_backend`.

    Returns:
        A context manager, which can also decorate a function.

    Raises:
        ValueError: ``name`` is not a backend. A backend that cannot run raises RuntimeError at the first call of an op.

    Example:
        >>> real, fake, eps = torch.randn(8, 2), torch.randn(8, 2), torch.rand(8)
        >>> with gpkernels.backend("reference"):
        ...     expected = gpkernels.interpolate(real, fake, eps)
        >>> torch.testing.assert_close(gpkernels.interpolate(real, fake, eps), expected)
    """
    _check(name)
    if is_compiling():
        before, _traced.name = _traced.name, name
        try:
            yield
        finally:
            _traced.name = before
        return
    token = _chosen.set(name)
    _carry()
    try:
        yield
    finally:
        _chosen.reset(token)
        _carry()


def _carry() -> None:
    """Hand the choice to PyTorch's thread-local state: backward on a GPU runs in a thread of autograd's."""
    carry(_CARRIED, (get_ident(), _chosen.get(None)))


def _carried() -> str | None:
    """Return the choice of the thread that this one works for, or None."""
    if not is_carried(_CARRIED):
        return None
    thread, name = carried(_CARRIED)
    return name if thread != get_ident() else None  # another task of this very thread


def add_kernels(name: str, kernels: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Register a backend that the dispatcher does not know.

    ``kernels`` maps op names to implementations and is called when the first of them is needed. ``set_backend`` accepts
    ``name`` from then on.
    """
    _tables[name] = kernels


def forced() -> str | None:
    """Return the backend that is forced in this thread, or None under "auto"."""
    traced = is_compiling()
    name = (_traced.name if traced else None) or _own.name
    if name is _own:  # no choice
        name = _everywhere if traced else _carried() or _everywhere
    return None if name == "auto" else name


def choice() -> tuple[tuple[ContextVar[str], dict[str, Any]], str]:
    """Return what ``forced`` reads, for C++: the thread's variable and this module's, and the key of one carried."""
    return (_chosen, globals()), _CARRIED


def unavailable(name: str) -> str | None:
    """Return why a backend cannot run here, with the remedy; None if it can."""
    if name == "cpu" and extension is None:
        cure = f"build them with a C++20 compiler: GPKERNELS_BUILD=cpu {REBUILD}"
        return f"the C++ kernels are not loaded ({extension_error}); {cure}"
    if name == "cuda" and cuda_error is not None:
        return (
            f"the CUDA kernels are not loaded ({cuda_error}); build them with nvcc and a PyTorch for CUDA: "
            f"GPKERNELS_BUILD=cuda {REBUILD}"
        )
    if name == "triton" and not has_triton():
        return "Triton is not installed; pip install triton, or use backend 'auto'"
    return None


def implementation(op: Op, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Return the forced backend's implementation of an op for these arguments; RuntimeError if there is none."""
    name = forced() or "auto"
    if name == "reference":
        return op.implementation
    if name in _tables and name not in NAMES:
        return _tables[name]()[op.name]
    reason, device = unavailable(name), _device(args).type
    if name == "triton":
        if reason is None and device not in GPUS and not interprets_triton():
            reason = f"it runs on GPU tensors, got {device} tensors; use backend 'auto'"
        kernel = _tables[name]().get(op.name) if reason is None else None
        if kernel is not None:
            return kernel
        reason = reason or "it has no Triton kernel"
    elif reason is None and device != name:
        reason = f"it runs on {name} tensors, got {device} tensors; use backend 'auto'"
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was forced, but {op.name} cannot run on it: {reason}")
    return op.implementation if (op.name, device) in _by_triton else op.overload


def running(device_type: str) -> str:
    """Return the backend that "auto" selects for a device type."""
    if device_type == "cpu":
        return "reference" if extension is None else "cpu"
    if device_type == "cuda" and cuda_error is None:
        return "cuda"
    return "triton" if takes_triton(device_type) else "reference"


def running_op(name: str, device_type: str) -> str:
    """Return the backend that "auto" selects for one op on a device type."""
    if (name, device_type) in _by_triton:
        return "triton"
    known = has_kernel(f"gpkernels::{name}", device_type.upper())
    return running(device_type) if known else "reference"


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
        warnings.warn(
            f"GPKERNELS_BACKEND: expected one of {', '.join(NAMES)}, got {name!r}; using 'auto'", stacklevel=2
        )


load_extension()
_from_environment()
