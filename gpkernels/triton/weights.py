"""clip_weights_ and rmsprop_: all parameters of a dtype in one launch, a chunk of one tensor per program."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.triton.common import accumulator, block_of, capturing, check_floating, check_same, launch, queue_of
from gpkernels.triton.functions import divide, square_root

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_captured: list[Tensor] = []


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load a pointer from a table."""
    address = tl.load(entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def clip(x, c):
    """Clamp to [-c, c]; NaN stays NaN, as in torch.clamp."""
    return tl.where(x < -c, -c, tl.where(x > c, c, x))


@triton.jit
def _clip_block(p, c, at, mask, ACC: tl.constexpr):
    tl.store(p + at, clip(tl.load(p + at, mask=mask).to(ACC), tl.full([], c, ACC)), mask=mask)


@triton.jit
def clip_weights_kernel(
    table, c: tl.float64, TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    row = table + tl.program_id(0).to(tl.int64) * 2
    p, count = pointer(row, TYPE, ALIGNED), tl.load(row + 1)
    whole = count // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for first in range(0, whole, BLOCK):
        _clip_block(p, c, first + lane, None, ACC)
    if whole < count:
        _clip_block(p, c, whole + lane, whole + lane < count, ACC)


@triton.jit
def _rmsprop_block(
    p, g, square, average, buffer, at, mask, lr, alpha, rest, eps, decay, momentum, bound,
    ACC: tl.constexpr, CENTRED: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """Update of torch.optim.RMSprop, with its order of operations and fused multiply-adds, as in csrc/formulas.h."""
    param = tl.load(p + at, mask=mask).to(ACC)
    grad = tl.load(g + at, mask=mask).to(ACC)
    s = tl.load(square + at, mask=mask).to(ACC)
    if MAXIMIZE:
        grad = -grad
    if DECAY:
        grad = tl.fma(decay, param, grad)
    s = tl.fma(rest * grad, grad, s * alpha)
    tl.store(square + at, s, mask=mask)
    variance = s
    if CENTRED:
        a = tl.load(average + at, mask=mask).to(ACC)
        # as torch.lerp, which starts from the nearer end
        a = tl.fma(rest, grad - a, a) if NEAR else tl.fma(rest - 1.0, grad - a, grad)
        tl.store(average + at, a, mask=mask)
        variance = tl.fma(-a, a, s)
    step = square_root(variance) + eps
    if MOMENTUM:
        b = tl.load(buffer + at, mask=mask).to(ACC) * momentum + divide(grad, step)
        tl.store(buffer + at, b, mask=mask)
        param = tl.fma(-lr, b, param)
    else:
        param = param + divide(-lr * grad, step)
    tl.store(p + at, clip(param, bound), mask=mask)


@triton.jit
def rmsprop_kernel(
    table, lr: tl.float64, alpha: tl.float64, rest: tl.float64, eps: tl.float64, decay: tl.float64,
    momentum: tl.float64, bound: tl.float64,
    TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    CENTRED: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    row = table + tl.program_id(0).to(tl.int64) * (4 + CENTRED + MOMENTUM)
    p, g = pointer(row, TYPE, ALIGNED), pointer(row + 1, TYPE, ALIGNED)
    square, average, buffer = pointer(row + 2, TYPE, ALIGNED), p, p
    if CENTRED:
        average = pointer(row + 3, TYPE, ALIGNED)
    if MOMENTUM:
        buffer = pointer(row + 3 + CENTRED, TYPE, ALIGNED)
    count = tl.load(row + 3 + CENTRED + MOMENTUM)
    lr, alpha, rest = tl.full([], lr, ACC), tl.full([], alpha, ACC), tl.full([], rest, ACC)
    eps, decay = tl.full([], eps, ACC), tl.full([], decay, ACC)
    momentum, bound = tl.full([], momentum, ACC), tl.full([], bound, ACC)
    whole = count // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for first in range(0, whole, BLOCK):
        _rmsprop_block(
            p, g, square, average, buffer, first + lane, None, lr, alpha, rest, eps, decay, momentum, bound,
            ACC, CENTRED, MOMENTUM, DECAY, MAXIMIZE, NEAR,
        )  # fmt: skip
    if whole < count:
        at = whole + lane
        _rmsprop_block(
            p, g, square, average, buffer, at, at < count, lr, alpha, rest, eps, decay, momentum, bound,
            ACC, CENTRED, MOMENTUM, DECAY, MAXIMIZE, NEAR,
        )  # fmt: skip


# --- tables of pointers -----------------------------------------------------------------------------------------------


def _chunks(lists: Sequence[Sequence[Tensor]]) -> list[int]:
    """For each chunk of each tensor: its address in every list's tensor, and its length."""
    total = sum(t.numel() for t in lists[0])
    chunk = block_of(lists[0][0]) * max(1, min(16, total // 2**20))
    entries: list[int] = []
    for tensors in zip(*lists, strict=True):
        starts, size, count = [t.data_ptr() for t in tensors], tensors[0].element_size(), tensors[0].numel()
        for begin in range(0, count, chunk):
            entries += [start + begin * size for start in starts]
            entries.append(min(chunk, count - begin))
    return entries


def _table(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the chunks on the device, cached while tensors keep their addresses, as an optimizer's do."""
    device = lists[0][0].device
    counts, starts = (t.numel() for t in lists[0]), (t.data_ptr() for tensors in lists for t in tensors)
    key = (*queue_of(device), len(lists), lists[0][0].dtype, *counts, *starts)
    if key in _tables and not capturing(device):
        _tables.move_to_end(key)
        return _tables[key]
    # Pinned, so that the copy is asynchronous.
    host = torch.tensor(_chunks(lists), dtype=torch.int64)
    host = host if device.type == "cpu" else host.pin_memory()
    table = host.to(device, non_blocking=True)
    if capturing(device):
        _captured.append(host)  # copied at every replay of the graph
        return table
    _tables[key] = table
    if len(_tables) > 64:
        _tables.popitem(last=False)
    return table


def _aligned(lists: Sequence[Sequence[Tensor]]) -> bool:
    return all(t.data_ptr() % 16 == 0 for tensors in lists for t in tensors)


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor is non-overlapping and dense, in any order of its axes."""
    step = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True


def _groups(lists: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Yield the lists by dtype and device; every tensor may be written through a flat pointer."""
    members: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, p in enumerate(lists[0]):
        if p.numel():
            members.setdefault((p.dtype, p.device), []).append(i)
    for indices in members.values():
        yield [[tensors[i] for i in indices] for tensors in lists]


class _Flat:
    """Tensors that kernels may write through flat pointers: the originals, or copies that ``store`` writes back."""

    def __init__(self, lists: Sequence[Sequence[Tensor]]) -> None:
        self.own = lists
        self.lists = [list(tensors) for tensors in lists]
        for i, p in enumerate(lists[0]):
            if not _is_dense(p) or any(tensors[i].stride() != p.stride() for tensors in lists):
                for tensors in self.lists:
                    tensors[i] = tensors[i].contiguous()

    def store(self) -> None:
        for own, flat in zip(self.own, self.lists, strict=True):
            for mine, copy in zip(own, flat, strict=True):
                if copy is not mine:
                    mine.copy_(copy)


# --- ops --------------------------------------------------------------------------------------------------------------


def clip_weights_(params: Sequence[Tensor], c: float) -> None:
    check_floating(*params)
    flat = _Flat([params])
    for lists in _groups(flat.lists):
        first, table = lists[0][0], _table(lists)
        launch(
            clip_weights_kernel, table.numel() // 2, first.device, table, float(c),
            TYPE=_DTYPES[first.dtype], ACC=accumulator(first), BLOCK=block_of(first), ALIGNED=_aligned(lists),
            num_warps=4,
        )  # fmt: skip
    flat.store()


def rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    grad_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | None,
) -> None:
    check_floating(*params)
    given = {"grads": grads, "square_avgs": square_avgs, "grad_avgs": grad_avgs, "momentum_buffers": momentum_buffers}
    for name, tensors in given.items():
        if name.endswith(("avgs", "buffers")) and name != "square_avgs" and not tensors:
            continue
        if len(tensors) != len(params):
            raise RuntimeError(f"{name}: expected one tensor for each of {len(params)} parameters, got {len(tensors)}")
        for x, p in zip(tensors, params, strict=True):
            check_same(name, x, p)
    flat = _Flat([params, grads, square_avgs, *(tensors for tensors in (grad_avgs, momentum_buffers) if tensors)])
    for lists in _groups(flat.lists):
        first, table = lists[0][0], _table(lists)
        launch(
            rmsprop_kernel, table.numel() // (len(lists) + 1), first.device,
            table, lr, alpha, 1 - alpha, eps, weight_decay, momentum, inf if clip is None else clip,
            TYPE=_DTYPES[first.dtype], ACC=accumulator(first), BLOCK=block_of(first), ALIGNED=_aligned(lists),
            CENTRED=bool(grad_avgs), MOMENTUM=bool(momentum_buffers), DECAY=weight_decay != 0,
            MAXIMIZE=bool(maximize), NEAR=1 - alpha < 0.5, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    flat.store()
