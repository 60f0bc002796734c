"""What ops share of dtypes, rows and memory layouts."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promote(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that PyTorch would compute them in."""
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype:
            break
    else:
        return list(tensors)
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """One number per row, to be broadcast over a batch."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def rows_of(x: Tensor) -> Tensor:
    """A batch as a matrix, in the dtype that its sums are taken in."""
    return x.to(accumulation_dtype(x.dtype)).reshape(x.shape[0], -1)


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last where every tensor is so, otherwise contiguous: the layout that kernels read and write."""
    if all(t.is_contiguous() for t in tensors):
        return torch.contiguous_format
    layout = _LAYOUTS.get(tensors[0].dim(), torch.contiguous_format)
    same = all(t.dim() == tensors[0].dim() and t.is_contiguous(memory_format=layout) for t in tensors)
    return layout if same else torch.contiguous_format


def laid_out(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the layout that they have in common."""
    layout = memory_format(*tensors)
    return [t.contiguous(memory_format=layout) for t in tensors]


def new_like(x: Tensor, *others: Tensor) -> Tensor:
    """An output for ``x`` in the layout that it has in common with ``others``."""
    return torch.empty_like(x, memory_format=memory_format(x, *others))


def new_wide(x: Tensor, *shape: int) -> Tensor:
    """An output on the device of ``x``, in the dtype that its sums are taken in."""
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def overlaps(x: Tensor) -> bool:
    """Whether elements share a place, as in what was expanded."""
    return x.numel() > 0 and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
