"""Which implementation of an op runs, and why.

"auto" leaves the choice to PyTorch's dispatcher: a native kernel for the tensors' device type where one is registered,
on GPUs otherwise a Triton kernel where Triton is installed, otherwise the reference. A forced backend that cannot run
raises on the first call, with the cure; importing never fails because of a backend, and imports no Triton.

``set_backend`` chooses for the process, ``backend`` for the thread or async task that enters it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
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

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")
GPUS = ("cuda", "xpu")  # device types; "cuda" is AMD's too
_everywhere = "auto"  # what set_backend chose
_chosen: ContextVar[str] = ContextVar("gpkernels.backend")  # what backend chose, where it did
_CARRIED = "gpkernels.backend"  # the key of that choice in the state that PyTorch carries from thread to thread
_tables: dict[str, Callable[[], Mapping[str, Callable[..., Any]]]] = {}
_short_ways: list[tuple[Op, Callable[..., Any]]] = []


class Op(Protocol):
    """What is asked of an op here."""

    name: str
    implementation: Callable[..., Any]
    overload: Any
    direct: Callable[..., Any]


def declined(*args: Any) -> Any:
    """A short way that there is not."""
    return NotImplemented


extension: Any = None
# By an op's name, the variable that may close it in a thread, and whether it has a CUDA kernel, the short way to it.
direct: Callable[[str, ContextVar[str], bool], Callable[..., Any]] | None = None
deliver: Callable[..., Any] = declined  # (value, gradients, tensors): critic/deliver.py in C++
program: Any = None  # the module whose loop runs the passes of a critic, and which reads autograd's graph
extension_error: str | None = None
cuda_error: str | None = "the package was built without them"  # None once they are loaded


# --- loading ----------------------------------------------------------------------------------------------------------


def load_extension() -> None:
    """Load the native kernels; a failure is kept for ``info`` and for a forced backend's message."""
    global extension, extension_error, cuda_error, direct, deliver, program
    try:
        extension = importlib.import_module("gpkernels._C")
    except ModuleNotFoundError:
        extension_error = "the package was built without it"
    except (ImportError, OSError, RuntimeError) as error:
        extension_error = " ".join(str(error).split())
    else:
        module = _load_short_way("_direct")
        if module is not None:
            direct, deliver = module.direct, module.deliver
        program = _load_short_way("_program")
    if CUDA_LIBRARY.exists():
        try:
            torch.ops.load_library(str(CUDA_LIBRARY))
            cuda_error = None
        except (OSError, RuntimeError) as error:
            cuda_error = " ".join(str(error).split())


def _load_short_way(name: str) -> Any:
    """A module of short ways; None where it was not built for this very version of PyTorch."""
    if extension.build_info()["torch"] != torch.__version__:  # then it is not even safe to load
        return None
    try:
        module = importlib.import_module(f"gpkernels.{name}")
    except (ImportError, OSError, RuntimeError):
        return None
    return module if torch.__version__ == module.TORCH else None


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(device_type: str) -> bool:
    """Whether "auto" gives this device's tensors Triton kernels. Asks no device, only what PyTorch was built for."""
    built = {"cuda": torch.backends.cuda.is_built() and cuda_error is not None, "xpu": xpu_is_built()}
    return built.get(device_type, False) and has_triton()


def bind_directly(ops: Mapping[str, Op]) -> None:
    """Give each op with a C++ kernel its short way; from then on ``set_backend`` opens and closes it."""
    if direct is not None:
        on_gpus = cuda_error is None
        _short_ways.extend(
            (op, direct(f"gpkernels::{name}", _chosen, on_gpus))
            for name, op in ops.items()
            if running_op(name, "cpu") == "cpu"
        )
    _open_short_ways()


def _open_short_ways() -> None:
    """They lead to the C++ and CUDA kernels, so they are open where the process gives tensors these.

    A thread that chose another backend for itself finds them closed: they look at its choice themselves.
    """
    for op, way in _short_ways:
        op.direct = way if _everywhere == "auto" or (_everywhere == "cpu" and cuda_error is not None) else declined


# --- choosing ---------------------------------------------------------------------------------------------------------


class _Own:
    """``name``: what the thread or async task that reads it chose for itself; the object where it chose nothing.

    The getter is C, so that ``torch.compile`` reads it and guards what it read; it can trace no ``ContextVar``.
    """

    name = property(_chosen.get)  # whose argument is what it gives in place of nothing: here the object


class _Traced(local):
    """``name``: what code that ``torch.compile`` is tracing chose within itself, which leaves no trace outside."""

    def __init__(self) -> None:  # in each thread, so that tracing finds the name where it leaves it, in the object
        self.name: str | None = None


_own, _traced = _Own(), _Traced()


def _check(name: str) -> None:
    if name not in NAMES and name not in _tables:
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
    _open_short_ways()


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
    """Let PyTorch carry the choice along: a backward pass on a GPU runs in a thread of autograd's."""
    carry(_CARRIED, (get_ident(), _chosen.get(None)))


def _carried() -> str | None:
    """The choice of the thread that this one works for, if it did choose."""
    if not is_carried(_CARRIED):
        return None
    thread, name = carried(_CARRIED)
    return name if thread != get_ident() else None  # what another task of this very thread chose is not ours


def add_kernels(name: str, kernels: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Kernels by their ops' names, asked for when one is first called, of a backend that the dispatcher does not have.

    ``set_backend`` takes its name from then on.
    """
    _tables[name] = kernels


def forced() -> str | None:
    """The name of the backend that is forced in this thread now, or None under "auto"."""
    traced = is_compiling()
    name = (_traced.name if traced else None) or _own.name
    if name is _own:  # nothing
        name = _everywhere if traced else _carried() or _everywhere
    return None if name == "auto" else name


def unavailable(name: str) -> str | None:
    """Why a backend cannot run here, with the cure; None if it can."""
    if name == "cpu" and extension is None:
        return (
            f"the C++ kernels are not loaded ({extension_error}); build them with a C++20 compiler: "
            "pip install --no-build-isolation -e ."
        )
    if name == "cuda" and cuda_error is not None:
        return (
            f"the CUDA kernels are not loaded ({cuda_error}); build them with nvcc and a PyTorch for CUDA: "
            "GPKERNELS_BUILD=cuda pip install --no-build-isolation -e ."
        )
    if name == "triton" and not has_triton():
        return "Triton is not installed; pip install triton, or use backend 'auto'"
    return None


def implementation(op: Op, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The forced backend's implementation of an op for these arguments; RuntimeError where it cannot run."""
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
    return op.overload


def running(device_type: str) -> str:
    """The backend that "auto" takes for a device type."""
    if device_type == "cpu":
        return "reference" if extension is None else "cpu"
    if device_type == "cuda" and cuda_error is None:
        return "cuda"
    return "triton" if takes_triton(device_type) else "reference"


def running_op(name: str, device_type: str) -> str:
    """The backend that "auto" takes for one op's tensors on a device type."""
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
