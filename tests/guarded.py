"""Tensors whose storage ends at an inaccessible page: an out-of-bounds access kills the process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PAGE = mmap.PAGESIZE
_READ_WRITE, _NO_ACCESS = 3, 0
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: Tensor, at_end: bool) -> Tensor:
    """A copy with the same strides, its first or last element beside a forbidden page. Its memory is never freed."""
    if x.numel() == 0:
        return x
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    body = -(-size // _PAGE) * _PAGE
    base = _libc.mmap(None, body + 2 * _PAGE, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
    for page in (base, base + _PAGE + body):
        if _libc.mprotect(page, _PAGE, _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    address = base + _PAGE + (body - size if at_end else 0)
    memory = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=x.dtype)
    memory.copy_(torch.as_strided(x, (span,), (1,)))
    return memory.as_strided(x.shape, x.stride())


class _Allocations(TorchFunctionMode):
    """Guards what is allocated, too."""

    MAKERS = (
        torch.empty,
        torch.empty_like,
        torch.zeros,
        torch.tensor,
        Tensor.new_empty,
        Tensor.contiguous,
        Tensor.reshape,
    )

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in self.MAKERS:
            return result
        with torch._C.DisableTorchFunction():
            own = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
            return result if result.untyped_storage().data_ptr() in own else guarded(result, self.at_end)


@contextmanager
def guarded_allocations(at_end: bool) -> Iterator[None]:
    """Outputs and workspaces that are made inside are guarded."""
    with _Allocations(at_end):
        yield
