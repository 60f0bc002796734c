"""Dtypes, rows and memory layouts, as the ops share them."""

from __future__ import annotations

import sys
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promote(*tensors: Tensor) -> list[Tensor]:
    """Cast the tensors to their promoted dtype."""
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype:
            break
    else:
        return list(tensors)
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per row for broadcasting over a batch."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def rows_of(x: Tensor) -> Tensor:
    """Reshape a batch to a matrix, in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).reshape(x.shape[0], -1)


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Return channels_last if every tensor has that format, otherwise contiguous: the format of kernels."""
    if all(t.is_contiguous() for t in tensors):
        return torch.contiguous_format
    layout = _LAYOUTS.get(tensors[0].dim(), torch.contiguous_format)
    same = all(t.dim() == tensors[0].dim() and t.is_contiguous(memory_format=layout) for t in tensors)
    return layout if same else torch.contiguous_format


def laid_out(*tensors: Tensor) -> list[Tensor]:
    """Make the tensors dense in their common memory format."""
    layout = memory_format(*tensors)
    return [t.contiguous(memory_format=layout) for t in tensors]


def new_like(x: Tensor, *others: Tensor) -> Tensor:
    """Allocate an output for ``x`` in the memory format that it has in common with ``others``."""
    return torch.empty_like(x, memory_format=memory_format(x, *others))


def new_wide(x: Tensor, *shape: int) -> Tensor:
    """Allocate an output on the device of ``x``, in the accumulation dtype."""
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def is_distributed(x: Any) -> bool:
    """Whether this is a DTensor, of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any, like: Any) -> Any:
    """Return the part of a DTensor that this process has of it if it is distributed as ``like``; else the tensor."""
    return x.redistribute(placements=like.placements).to_local() if is_distributed(x) else x


def overlaps(x: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor."""
    return x.numel() > 0 and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
