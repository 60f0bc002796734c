"""Shared parts of the Triton ops: launching, layouts, checks, per-row operands, alignment, and sums over programs."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops.tensors import accumulation_dtype, memory_format

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_tickets: dict[tuple[torch.device, int], Tensor] = {}


# --- launching --------------------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before this package was imported."""
    return not isinstance(last_to_arrive, triton.JITFunction)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Launch ``programs`` programs of a kernel on a device, which need not be the current one."""
    if programs == 0:
        return
    if device.type == "cpu":
        if not interpreted():
            raise RuntimeError("Triton runs CPU tensors only where TRITON_INTERPRET=1 was set before Python started")
        guard: Any = nullcontext()
    else:
        guard = getattr(torch, device.type).device(device)
    options.setdefault("enable_fp_fusion", True)
    with guard:
        kernel[(programs,)](*args, **options)


def block_of(x: Tensor) -> int:
    """Return the elements per block for 16 bytes per thread, for four warps of 32 or of 64 threads."""
    return 1024 if x.element_size() > 2 else 2048


def flat_sizes(x: Tensor, count: int) -> tuple[int, dict[str, int]]:
    """Return (programs, block) for streaming over ``count`` elements of x's dtype."""
    block, warps = (block_of(x), 4) if count < 2**22 else (2 * block_of(x), 8)
    return triton.cdiv(count, block), {"BLOCK": block, "num_warps": warps}


def row_sizes(rows: int, *cols: int) -> dict[str, Any]:
    """Return how programs share sums over rows of matrices: many rows per program, or several programs per row."""
    tile, longest = 2048, max(1, *cols)
    widths = [min(tile, triton.next_power_of_2(max(1, c))) for c in cols]
    # Depends on the shape alone, so that every device adds in the same order.
    splits = max(1, min(triton.cdiv(longest, 4096), 512 // rows, 64))
    height = 1 if splits > 1 else min(tile // max(widths), triton.next_power_of_2(rows), 1024)
    return {
        "programs": rows * splits if splits > 1 else triton.cdiv(rows, height),
        "spans": [triton.cdiv(triton.cdiv(c, splits), w) * w for c, w in zip(cols, widths, strict=True)],
        "widths": widths,
        "rows": height,
        "splits": splits,
    }


def accumulator(*tensors: Tensor) -> tl.dtype:
    """Return the accumulation dtype: float64 if any tensor has that dtype, otherwise float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def capturing(device: torch.device) -> bool:
    """Whether launches are being captured into a graph, which may be replayed later and on another stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def queue_of(device: torch.device) -> tuple[torch.device, int]:
    """Return a key for the stream on which kernels are ordered; memory that is cached between calls belongs to one."""
    if device.type == "cpu":
        return device, 0
    return device, getattr(torch, device.type).current_stream(device).stream_id


def tickets(device: torch.device, count: int) -> Tensor:
    """Return ``count`` zeros for ``last_to_arrive``, which resets them, so that a stream's kernels can share them."""
    if capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = queue_of(device)
    if key not in _tickets or _tickets[key].numel() < count:
        _tickets[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _tickets[key]


# --- tensors ----------------------------------------------------------------------------------------------------------


def check_floating(*tensors: Tensor) -> None:
    """Raise RuntimeError unless all tensors are of floating point."""
    if any(t.dtype not in _FLOATING for t in tensors):
        raise RuntimeError(f"expected floating-point tensors, got {', '.join(str(t.dtype) for t in tensors)}")


def check_codes(name: str, codes: Sequence[int], known: Mapping[str, int]) -> None:
    """Raise RuntimeError for a code that is not in ``known``."""
    wrong = [code for code in codes if code not in known.values()]
    if wrong:
        raise RuntimeError(f"{name}: expected 0 to {len(known) - 1}, got {wrong[0]}")


def rows_of(name: str, x: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of a batch."""
    check_floating(x)
    if x.dim() == 0 or x.shape[0] == 0:
        raise RuntimeError(f"{name}: expected a batch of at least one sample, got shape {tuple(x.shape)}")
    return x.shape[0], x.numel() // x.shape[0]


def check_same(name: str, x: Tensor, like: Tensor) -> None:
    """Raise RuntimeError unless ``x`` has the dtype and shape of ``like``."""
    if x.dtype != like.dtype:
        raise RuntimeError(f"{name}: expected dtype {like.dtype}, got {x.dtype}")
    if x.shape != like.shape:
        raise RuntimeError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(x.shape)}")


def check_key(key: Tensor) -> None:
    """Raise RuntimeError unless ``key`` is one int64."""
    if key.dtype != torch.int64 or key.numel() != 1:
        raise RuntimeError(f"key: expected one int64, got {key.dtype} of shape {tuple(key.shape)}")


def spread(name: str, x: Tensor, rows: int, one: bool = False) -> tuple[Tensor, int]:
    """Flatten one number per row, or one for all where ``one`` allows it; return it with its stride, without a copy."""
    check_floating(x)
    if x.numel() != rows and not (one and x.numel() == 1):
        raise RuntimeError(f"{name}: expected one number per row, {rows} in all, got shape {tuple(x.shape)}")
    flat = x.reshape(-1)
    return flat, flat.stride(0) if flat.numel() > 1 else 0


def dense(*tensors: Tensor) -> list[Tensor]:
    """Make the tensors dense in one common memory format."""
    layout = memory_format(*tensors)
    return [t.contiguous(memory_format=layout) for t in tensors]


def empty_like(x: Tensor) -> Tensor:
    """Allocate an output for ``x``, which has a format of ``dense``."""
    return torch.empty_like(x, memory_format=memory_format(x))


def wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def aligned(cols: int) -> bool:
    """Whether every row of a dense matrix is aligned for vector loads."""
    return cols % 16 == 0


# --- one number per row -----------------------------------------------------------------------------------------------


@triton.jit
def begin_of_block(BLOCK: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK


@triton.jit
def rows_in_block(start, cols, BLOCK: tl.constexpr):
    """Row and column of each element where rows are shorter than a block: a 32-bit division per element."""
    first = start // cols
    col = (start - first * cols).to(tl.int32) + tl.arange(0, BLOCK)
    row = col // cols.to(tl.int32)
    return first + row, col - row * cols.to(tl.int32)


@triton.jit
def per_row(values, stride, start, rows, cols, ACC: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr):
    """Value of each element's row, for a block of elements from ``start``; LONG: a block spans at most two rows."""
    if LONG:
        first = start // cols
        here = tl.load(values + first * stride, mask=first < rows, other=0.0).to(ACC)
        after = tl.load(values + (first + 1) * stride, mask=first + 1 < rows, other=0.0).to(ACC)
        number = tl.where(tl.arange(0, BLOCK) < (first + 1) * cols - start, here, after)
    else:
        row, _ = rows_in_block(start, cols, BLOCK)
        number = tl.load(values + row * stride, mask=row < rows, other=0.0).to(ACC)
    return number


# --- alignment --------------------------------------------------------------------------------------------------------


@triton.jit
def hinted(n, ALIGNED: tl.constexpr):
    """Return ``n``, as a visible multiple of 16 where ALIGNED."""
    if ALIGNED:
        n = n // 16 * 16
    return n


# --- sums -------------------------------------------------------------------------------------------------------------


@triton.jit
def square_sums(
    x, y, row, rows, begin, end, cols,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PAIR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums of x^2, or of (x - y)^2 for a PAIR, over columns [begin, end) of the given rows."""
    sums = tl.zeros([ROWS, COLS], ACC)
    stop = hinted(end, ALIGNED)
    base = row[:, None] * hinted(cols, ALIGNED)
    for first in range(begin, stop, COLS):
        col = first + tl.arange(0, COLS)[None, :]
        mask = (row < rows)[:, None] & (col < stop)
        value = tl.load(x + base + col, mask=mask, other=0.0).to(ACC)
        if PAIR:
            value -= tl.load(y + base + col, mask=mask, other=0.0).to(ACC)
        sums += value * value
    return tl.sum(sums, 1)


@triton.jit
def last_to_arrive(ticket, programs):
    """Whether this is the last of ``programs`` programs to arrive: it sees all earlier stores of the others."""
    tl.debug_barrier()  # orders this program's stores before its arrival
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def sum_of(values, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum what other programs stored, in a fixed order."""
    sums = tl.zeros([BLOCK], ACC)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(values + at, mask=at < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit
def split_sums(partial, row, rows, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    """Sums of rows that SPLITS programs share."""
    part = tl.arange(0, PADDED)[None, :]
    mask = (row < rows)[:, None] & (part < SPLITS)
    return tl.sum(tl.load(partial + row[:, None] * SPLITS + part, mask=mask, other=0.0, cache_modifier=".cg"), 1)
