"""Checks of every public op on a backend: values, two orders of gradients, repeatability, special values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

import gpkernels as gpk
from gpkernels.verify.cases import CASES, DTYPES, PLACES, SHAPES, Case, laid_out
from gpkernels.verify.result import Result, distance

EDGES = ("zero", "inf", "nan", "denormal", "huge", "tiny")
THREADS = (1, 2, 4)


def device_of(backend: str) -> torch.device:
    """Return the device of a backend's tensors."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def check_op(name: str, backend: str, dtype: str, quick: bool) -> Iterator[Result]:
    """Check one op on one backend in one dtype."""
    case, device = CASES[name], device_of(backend)
    places = [("odd", "contiguous"), ("image", "transposed")] if quick else PLACES
    with gpk.backend(backend):
        for shape, layout in places:
            torch.manual_seed(0)
            inputs = [
                (x if kind == "e" else laid_out(x, layout)).to(device)
                for x, kind in zip(case.inputs(SHAPES[shape], DTYPES[dtype]), case.kinds, strict=True)
            ]
            yield from _orders(case, name, backend, dtype, f"{'x'.join(map(str, SHAPES[shape]))}, {layout}", inputs)
        yield _repeatable(case, name, backend, dtype, device)
        for edge in EDGES:
            yield _at_the_edge(case, name, backend, dtype, device, edge)


def derivatives(
    function: Callable[..., Tensor], case: Case, inputs: Sequence[Tensor], second: bool = True
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Compute [value], its gradients, and the gradients of their product with fixed directions."""
    tensors = [x.detach() for x in inputs]
    leaves = case.differentiable(tensors)
    value = function(*tensors)
    cotangent = torch.linspace(0.5, 1.5, max(value.numel(), 1), dtype=torch.float64, device=value.device)
    first = torch.autograd.grad(
        value, leaves, cotangent.reshape(value.shape).to(value.dtype), create_graph=second, allow_unused=True
    )
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(first, leaves, strict=True)]
    bent: list[Tensor] = []
    if second and any(g.requires_grad for g in found):
        directions = [torch.linspace(-1, 1, g.numel(), dtype=torch.float64, device=g.device) for g in found]
        product = sum((g.double() * d.reshape(g.shape)).sum() for g, d in zip(found, directions, strict=True))
        assert isinstance(product, Tensor)
        again = torch.autograd.grad(product, leaves, allow_unused=True)
        bent = [torch.zeros_like(x) if g is None else g for g, x in zip(again, leaves, strict=True)]
    return [value], found, bent


def _orders(case: Case, name: str, backend: str, dtype: str, where: str, inputs: Sequence[Tensor]) -> Iterator[Result]:
    exact = derivatives(case.specification, case, [x.double() for x in inputs])
    ours = derivatives(case.function, case, inputs)
    plain = derivatives(case.specification, case, inputs)
    floor = torch.finfo(DTYPES[dtype]).eps
    for order, got, ordinary, true in zip(("value", "gradient", "second gradient"), ours, plain, exact, strict=True):
        true = true or [torch.zeros_like(x) for x in got]  # linear functions have none
        got, ordinary = got or true, ordinary or true
        apart, usual = distance(got, true), distance(ordinary, true)
        # In low precision, at most twice PyTorch's error, plus one rounding of the result.
        ok = apart.relative <= 2 * usual.relative + (4 if order != "second gradient" else 16) * floor
        yield Result(
            order, name, backend, dtype, where, ok, apart.absolute, apart.relative, usual.relative, apart.cosine
        )


def _repeatable(case: Case, name: str, backend: str, dtype: str, device: torch.device) -> Result:
    torch.manual_seed(0)
    inputs = [x.to(device) for x in case.inputs((257, 33), DTYPES[dtype])]
    found = []
    for threads in (*THREADS, 1):
        with _threads(threads):
            value, gradients, _ = derivatives(case.function, case, inputs, second=False)
            found.append([*value, *gradients])
    same = all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))
    where = f"threads {', '.join(map(str, THREADS))}, and once more"
    return Result("same bits", name, backend, dtype, where, same, note="" if same else "bits differ")


def _at_the_edge(case: Case, name: str, backend: str, dtype: str, device: torch.device, edge: str) -> Result:
    """Check special values.

    Results are non-finite exactly where PyTorch's are; finite ones agree with PyTorch's, or with float64's where
    PyTorch overflows or underflows earlier.
    """
    kind = DTYPES[dtype]
    torch.manual_seed(0)
    pairs = zip(case.inputs((4, 6), kind), case.kinds, strict=True)
    inputs = [(_edged(x, kind, edge) if which == "r" else x).to(device) for x, which in pairs]
    ours = derivatives(case.function, case, inputs, second=False)
    plain = derivatives(case.specification, case, inputs, second=False)
    exact = derivatives(case.specification, case, [x.double() for x in inputs], second=False)
    worst = 0.0
    for got, usual, true in zip(*([*value, *gradients] for value, gradients, _ in (ours, plain, exact)), strict=True):
        rounded = true.to(got.dtype)
        scale = max(
            [float(x.detach()[x.isfinite()].abs().max()) for x in (usual, rounded) if x.isfinite().any()], default=0.0
        )
        apart = torch.minimum(_apart(got, usual), _apart(got, rounded)) / max(scale, torch.finfo(kind).tiny)
        worst = max(worst, float(apart.max()))
    ok = worst <= 16 * torch.finfo(kind).eps
    return Result("edge values", name, backend, dtype, edge, ok, relative=worst, note="beside PyTorch in this dtype")


def _apart(got: Tensor, other: Tensor) -> Tensor:
    """Compute elementwise differences; 0 where both are the same infinity or NaN, infinite where one is not."""
    a, b = got.detach().double(), other.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).abs().nan_to_num(nan=float("inf")).masked_fill(same, 0.0)


def _edged(x: Tensor, dtype: torch.dtype, edge: str) -> Tensor:
    info = torch.finfo(dtype)
    values = {
        "zero": 0.0,
        "inf": float("inf"),
        "nan": float("nan"),
        "denormal": info.tiny / 4,
        "huge": info.max**0.5 * 4,  # whose square overflows
        "tiny": info.tiny**0.5 / 4,  # whose square underflows
    }
    x = x.clone()
    if edge in ("inf", "nan"):
        x[0, 0] = values[edge]
    else:
        x[0] = values[edge]
    return x


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
