"""Cases for the Triton kernels in Triton's interpreter: each raw op over shapes, memory layouts and dtypes.

Run as a program, under TRITON_INTERPRET=1, it runs every case of a dtype and prints how far each is from the reference,
as JSON; with ``guarded-start`` or ``guarded-end``, on tensors beside forbidden pages. Only ``run`` needs triton.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpkernels import ops
from gpkernels.ops.score_loss import ScoreLoss
from gpkernels.verify.cases import DTYPES, LAYOUTS, laid_out

SHAPES = {"one": (1, 1), "odd": (3, 7), "pairs": (257, 2), "aligned": (5, 48), "image": (4, 3, 5, 9), "long": (2, 4501)}
PLACES = [(shape, "contiguous") for shape in SHAPES] + [("image", layout) for layout in LAYOUTS[1:]]
# Launchers treat layouts alike in every dtype; float16 rounds like bfloat16, float64 does not.
PLACES_OF = {"float32": PLACES, "float64": PLACES[: len(SHAPES)], "float16": PLACES[:2], "bfloat16": PLACES}
GUARDED = ("one", "odd", "long", "image, transposed", "groups", "attention", "weights", "special")
KEY = 12345678901234567
Arguments = tuple[Any, ...]


# --- arguments --------------------------------------------------------------------------------------------------------


def _of_rows(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> dict[str, list[Arguments]]:
    """Arguments of the ops that take batches of any shape."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = (laid_out(torch.randn(shape).to(dtype), layout) for _ in range(2))
    s, t = (laid_out(torch.randn(shape[0], 1).to(dtype), "transposed") for _ in range(2))
    none, key, one = x.new_empty(shape[0], 0), torch.tensor([KEY]), torch.tensor(0.7, dtype=wide)
    per_row, strided = torch.rand(shape[0], dtype=wide), torch.rand(shape[0], 2, dtype=wide)[:, 0]
    column = per_row.reshape(-1, *[1] * (len(shape) - 1))
    return {
        "interpolate": [(x, y, per_row), (x, y, column), (x, y, strided)],
        "interpolate_backward": [(x, strided, True, True), (x, per_row, True, False), (x, per_row, False, True)],
        "instance_noise": [(x, 0.5, None, key, True), (x, 0.3, one, key, False)],
        "gradient_norm_penalty": [
            (x, 1.0, False, 1, 2.0),
            (x, 0.0, True, 2, 2.0),
            (x, 2.5, True, 0, 2.0),
            (x, 1.0, False, 1, 1.0),
            (x, 2.5, True, 0, 1.0),
            (x, 1.1, False, 0, 1.5),
            (x, 0.0, True, 1, 3.0),
        ],
        "gradient_norm_penalty_backward": [(one, x, per_row), (strided, x, strided), (one.expand(len(x)), x, per_row)],
        "consistency_term": [(s, t, none, none, 0.1, 0.1), (s, t, x, y, 0.1, 0.3), (x, y, s, t, 0.0, 0.3)],
        "lipschitz_consistency": [(s, t, x, y, 0.01), (s.flatten(), t.flatten(), x, y, 0.0)],
        "consistency_backward": [
            (one, s, t, none, none, per_row, per_row, False),
            (one, s, t, x, y, per_row, strided, True),
            (one, x, y, s, t, per_row, strided, True),
        ],
        "score_loss": [([x, s], [1, 0], [0.0, 0.0]), ([s, x], [2, 3], [0.0, 0.0]), ([y, s], [4, 7], [0.0, 0.9])],
        "score_loss_backward": [
            (one, [x, s], [0, 1], [0.0, 0.0]),
            (one, [20 * s, 5 * x], [2, 3], [0.0, 0.0]),
            (one, [y, s], [7, 7], [-1.0, 0.9]),
        ],
        "relativistic_loss": [(x, y), (s, 5 * t)],
        "relativistic_loss_backward": [(one, 20 * x, y), (one, s, 5 * t)],
    }


def _normal(*shape: int) -> Tensor:
    return torch.nn.functional.layer_norm(torch.randn(shape, dtype=torch.float64), shape[-1:], eps=0.0)


def _of_groups(dtype: torch.dtype) -> dict[str, list[Arguments]]:
    """Arguments of the ops of normalisation, affine layers and pooling, by shape."""
    curvature, affine, pool, spread = [], [], [], []
    for shape in ((1, 1, 3), (2, 3, 5), (3, 2, 48), (2, 2, 1040), (1, 1, 8207)):
        n, t, d = _normal(*shape), torch.randn(shape) + 3, torch.randn(shape)
        r = torch.rand(*shape[:2], 1).to(dtype)
        curvature += [(n.to(dtype), r, t.to(dtype), d.to(dtype), centred) for centred in (True, False)]
    for shape in ((1, 1, 1), (70, 300, 1), (700, 5, 1), (2, 3, 5), (9, 4, 16), (3, 2, 1100), (0, 3, 2)):
        affine.append(tuple(torch.randn(shape).to(dtype) for _ in range(2)))
    affine.append(tuple(torch.randn(5, 7, 4).to(dtype).transpose(1, 2) for _ in range(2)))
    for h, w, layout in ((2, 2, "contiguous"), (2, 2, "channels_last"), (3, 1, "channels_last"), (1, 3, "transposed")):
        pool.append((laid_out(torch.randn(3, 5, 2 * h, 3 * w).to(dtype), layout), h, w))
        spread.append((laid_out(torch.randn(3, 5, 2, 3).to(dtype), layout), h, w))
    pool += [(torch.randn(5, 6, 9).to(dtype), 3, 3), (torch.randn(2, 16, 7, 5).to(dtype), 7, 5)]
    pool.append((torch.randn(2, 16, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last), 4, 4))
    spread += [(torch.randn(2, 3, 1, 1).to(dtype), 5, 3), (torch.randn(70, 33).to(dtype), 2, 2)]
    return {
        "normalise_curvature": curvature,
        "affine_gradients": affine,
        "mean_pool": pool,
        "mean_pool_backward": spread,
    }


def _of_attention(dtype: torch.dtype) -> dict[str, list[Arguments]]:
    """Arguments of attention: tiles that are cut off, each kind of mask, other widths, rows that see no key, NaN."""
    some = torch.rand(2, 1, 19, 21) > 0.4
    some[0, 0, 3] = False
    added = torch.randn(1, 3, 1, 21).to(dtype)
    found: dict[str, list[Arguments]] = {}
    for length, keys, width, values, mask, is_causal in (
        (19, 21, 16, 16, some, False),
        (35, 18, 20, 5, None, True),
        (2, 21, 8, 8, added, False),
        (17, 40, 8, 33, None, True),
        (19, 21, 136, 200, some, False),
        (35, 70, 192, 192, None, True),
        (40, 21, 256, 24, added, False),
        (18, 35, 24, 256, None, True),
        (5, 3, 257, 4, None, False),
    ):
        query, tq = (torch.randn(2, 3, length, width).to(dtype) for _ in range(2))
        key, tk = (torch.randn(2, keys, 3, width).to(dtype).transpose(1, 2) for _ in range(2))
        value, tv = (torch.randn(2, 3, keys, values).to(dtype) for _ in range(2))
        call, constants, name = (query, key, value), (mask, is_causal, 0.3), "scaled_dot_product_attention"
        kept = (*call, *ops.ALL[name].implementation(*call, *constants))
        cotangent, tangents = torch.randn(kept[3].shape).to(dtype), (tq, tk, tv)
        known = ops.ALL[f"{name}_jvp"].implementation(*tangents, *kept, *constants)
        found.setdefault(name, []).append((*call, *constants))
        found.setdefault(f"{name}_backward", []).append((cotangent, *kept, *constants))
        found.setdefault(f"{name}_jvp", []).append((*tangents, *kept, *constants))
        for tangent in ((None, None), known):
            given = (*tangents, cotangent, *kept, *tangent, *constants)
            found.setdefault(f"{name}_double_backward", []).append(given)
    broken = torch.randn(1, 2, 4, 8).to(dtype)
    broken[0, 0, 1, 2] = float("nan")
    found["scaled_dot_product_attention"].append((broken, broken.nan_to_num(), broken.nan_to_num(), None, False, 0.3))
    return found


def _of_weights(dtype: torch.dtype) -> dict[str, list[Arguments]]:
    """Arguments of the ops that write in place: many parameters, of which some have gaps or another order."""

    def tensors(low: float = -1.0) -> list[Tensor]:
        made = [torch.rand(shape) * (1 - low) + low for shape in ((3, 4), (7,), (), (0,), (40, 60), (2, 3, 5, 4))]
        made = [x.to(dtype) for x in made]
        return [*made[:4], made[4].t(), laid_out(made[5], "channels_last"), laid_out(made[0], "strided")]

    def rmsprop(centred: bool, with_momentum: bool, *options: Any) -> Arguments:
        averages, buffers = [t / 10 for t in tensors()], tensors()
        return (
            tensors(),
            tensors(),
            tensors(0.5),
            averages if centred else [],
            buffers if with_momentum else [],
            *options,
        )

    nan = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).to(dtype)
    return {
        "clip_weights_": [(tensors(), 0.3), ([nan, *(torch.randn(17).to(dtype) for _ in range(40))], 0.5), ([], 0.1)],
        "rmsprop_": [
            rmsprop(False, False, 1e-2, 0.9, 1e-8, 0.0, 0.0, False, None),
            rmsprop(True, True, 1e-2, 0.99, 1e-8, 0.1, 0.9, True, 0.5),
            rmsprop(True, False, 1e-3, 0.3, 1e-5, 0.0, 0.0, False, 0.05),
        ],
    }


def _special(dtype: torch.dtype) -> dict[str, list[Arguments]]:
    """Zero, infinite and NaN rows, and rows of no elements."""
    x, y, s, t = (torch.randn(5, 6).to(dtype) for _ in range(4))
    for i, value in enumerate((0.0, float("inf"), float("nan"))):
        x[i], y[i], s[i] = value, value, value
    y[3], t[4] = x[3], s[4]
    c = torch.rand(5)
    scores = torch.tensor([-800.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 800.0, float("inf"), -float("inf")]).to(
        dtype
    )
    one, empty, key = torch.tensor(0.7), torch.empty(3, 0, dtype=dtype), torch.tensor([KEY])
    return {
        "interpolate": [(x, t, c), (empty, empty, torch.rand(3))],
        "interpolate_backward": [(x, c, False, False), (empty, torch.rand(3), True, True)],
        "instance_noise": [(x, 0.5, None, key, True), (empty, 0.5, None, key, False)],
        "gradient_norm_penalty": [
            (x, target, one_sided, 0, power)
            for one_sided in (True, False)
            for target in (1.0, 0.0)
            for power in (2.0, 1.0, 1.5, 3.0)
        ]
        + [(empty, 1.0, False, 1, 2.0)],
        "gradient_norm_penalty_backward": [(one, x, c), (one, empty, torch.rand(3))],
        "consistency_term": [(s[3:], t[3:], x[3:], y[3:], 0.0, 0.1), (s[1:], t[1:], x[1:], y[1:], 0.0, 0.1)],
        "lipschitz_consistency": [(s[3:], t[3:], x[3:], y[3:], 0.0), (s[:1], t[:1], x[:1], y[:1], 0.0)],
        "score_loss": [([scores[1:8]], [kind], [0.1]) for kind in ScoreLoss]
        + [([scores], [2], [0.0]), ([x], [3], [0.0])],
        "score_loss_backward": [(one, [scores, x], [kind, kind], [0.1, -3.0]) for kind in ScoreLoss],
        "relativistic_loss": [
            (scores[1:8], scores[1:8].flip(0)),
            (scores, scores[:1].expand(11)),
            (x, y),
            (x[3:], y[3:]),
        ],
        "relativistic_loss_backward": [(one, scores, scores.flip(0)), (one, x, y)],
    }


def _named(name: str, table: dict[str, list[Arguments]]) -> Iterator[tuple[str, str, Arguments]]:
    for op, several in table.items():
        for i, arguments in enumerate(several):
            yield f"{op} {i + 1} of {name}", op, arguments


def cases() -> Iterator[tuple[str, str, Arguments]]:
    """(name, raw op, arguments); the same at every call."""
    for kind, dtype in DTYPES.items():
        torch.manual_seed(0)
        for shape, layout in PLACES_OF[kind]:
            yield from _named(f"{kind}, {shape}, {layout}", _of_rows(SHAPES[shape], layout, dtype))
        yield from _named(f"{kind} groups", _of_groups(dtype))
        yield from _named(f"{kind} attention", _of_attention(dtype))
        yield from _named(f"{kind} weights", _of_weights(dtype))
        yield from _named(f"{kind} special values", _special(dtype))


# --- comparing --------------------------------------------------------------------------------------------------------


def mapped(f: Any, value: Any) -> Any:
    """``f`` of every tensor in nested lists and tuples."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(f, v) for v in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda x: found.append(x) or x, value)
    return found


def copy(x: Tensor) -> Tensor:
    """The same values and strides, gaps and all, in memory of its own."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return torch.as_strided(x, (span,), (1,)).clone().as_strided(x.shape, x.stride())


def double(x: Tensor) -> Tensor:
    return copy(x).double() if x.is_floating_point() else x


def relative(got: Tensor, exact: Tensor) -> float:
    """The relative 2-norm error where numbers are finite; infinite where others differ."""
    got, exact = got.detach().double(), exact.detach().double()
    finite = torch.isfinite(exact)
    if not torch.equal(torch.nan_to_num(got[~finite], nan=7.0), torch.nan_to_num(exact[~finite], nan=7.0)):
        return float("inf")
    got, exact = got[finite], exact[finite]
    if got.numel() == 0:
        return 0.0
    error = (got - exact).norm() / exact.norm().clamp_min(1.0 if got.numel() == 1 else 1e-30)
    return float(torch.nan_to_num(error, nan=float("inf")))


def excess(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """The worst error, and the worst as a share of what it may be: twice the reference's, and some last places."""
    worst, share = 0.0, 0.0
    for a, b, e in zip(ours, plain, exact, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
            return float("inf"), float("inf")
        if a.is_floating_point():
            error = relative(a, e.to(a.dtype) if a.dtype == torch.float16 else e)
            # The interpreter truncates to bfloat16; in float64 the reference is its own yardstick.
            places = {torch.bfloat16: 2, torch.float64: 8}.get(a.dtype, 4)
            worst = max(worst, error)
            share = max(share, error / (2 * min(1.0, relative(b, e)) + places * torch.finfo(a.dtype).eps))
    return worst, share


def run(op: str, arguments: Arguments, guard: str) -> tuple[float, float]:
    from gpkernels.triton import KERNELS
    from guarded import guarded, guarded_allocations

    implementation = ops.ALL[op].implementation
    plain, exact = mapped(copy, arguments), mapped(double, arguments)
    results = [tensors_in([implementation(*given), given]) for given in (plain, exact)]
    if not guard:
        ours = mapped(copy, arguments)
        return excess(tensors_in([KERNELS[op](*ours), ours]), *results)
    at_end = guard == "guarded-end"
    ours = mapped(lambda x: guarded(x, at_end), arguments)
    with guarded_allocations(at_end):
        found = KERNELS[op](*ours)
    return excess(tensors_in([found, ours]), *results)


def refusals() -> dict[str, str]:
    """What a launcher raises for arguments whose sizes disagree, and for codes that name nothing."""
    from gpkernels.triton import KERNELS

    x, y, c, one = torch.randn(3, 4), torch.randn(3, 3), torch.rand(2), torch.tensor(1.0)
    h, rows = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
    wrong: dict[str, list[Arguments]] = {
        "interpolate": [(x, y, torch.rand(3)), (x, x, c), (x, x.half(), torch.rand(3)), (x.int(), x.int(), c)],
        "interpolate_backward": [(x, c, True, True)],
        "instance_noise": [(x, 1.0, c, torch.tensor([1]), True), (x, 1.0, None, one, True)],
        "gradient_norm_penalty": [(one, 1.0, False, 1, 2.0), (x[:0], 1.0, False, 1, 2.0), (x, 1.0, False, 3, 2.0)],
        "gradient_norm_penalty_backward": [(one, x, c), (c, x, torch.rand(3))],
        "consistency_term": [(x, y, x, x, 0.1, 0.1), (x, x, x[:2], x[:2], 0.1, 0.1)],
        "lipschitz_consistency": [(x, x, x, y, 0.1)],
        "consistency_backward": [(one, x, x, y, x, torch.rand(3), torch.rand(3), True), (c, x, x, x, x, c, c, False)],
        "score_loss": [
            ([], [], []),
            ([x], [1, 2], [0.0]),
            ([x], [7], []),
            ([x[:0]], [1], [0.0]),
            ([x, x], [0, len(ScoreLoss)], [0.0, 0.0]),
            ([x], [-1], [0.0]),
            ([x, x, x], [1, 1, 1], [0.0, 0.0, 0.0]),
        ],
        "score_loss_backward": [(c, [x], [1], [0.0]), (one, [x], [len(ScoreLoss)], [0.0])],
        "relativistic_loss": [
            (x, y),
            (x[:0], x[:0]),
            (x, x.half()),
            (x.int(), x.int()),
            (torch.rand(3), torch.rand(3, 1)),
        ],
        "relativistic_loss_backward": [(one, x, y), (c, x, x)],
        "normalise_curvature": [(x, x, x, x, True), (x[None], c, x[None], x[None], True)],
        "affine_gradients": [(x, x), (x[None], y[None])],
        "mean_pool": [(x, 2, 2), (x, 0, 1), (one, 1, 1)],
        "mean_pool_backward": [(x, 0, 1)],
        "scaled_dot_product_attention": [
            (h, h[:, :1], h, None, False, 1.0),
            (h, h, h[:, :, :3], None, False, 1.0),
            (h, h.half(), h, None, False, 1.0),
            (h[0], h[0], h[0], None, False, 1.0),
            (h.int(), h.int(), h.int(), None, False, 1.0),
            (h, h, h, torch.ones(4, 3), False, 1.0),
        ],
        "scaled_dot_product_attention_backward": [
            (h[..., :2], h, h, h, h, rows, None, False, 1.0),
            (h, h, h, h, h, rows[..., :2], None, False, 1.0),
            (h, h, h, h, h[:, :1], rows, None, False, 1.0),
        ],
        "scaled_dot_product_attention_jvp": [(h, h, h[:, :1], h, h, h, h, rows, None, False, 1.0)],
        "scaled_dot_product_attention_double_backward": [
            (h, h[:, :1], h, h, h, h, h, h, rows, None, None, None, False, 1.0),
            (h, h, h, h, h, h, h, h, rows, h, rows[..., :2], None, False, 1.0),
        ],
        "clip_weights_": [([x.int()], 0.1)],
        "rmsprop_": [([x], [y], [x], [], [], 0.1, 0.9, 0.0, 0.0, 0.0, False, None)],
    }
    raised = {}
    for op, several in wrong.items():
        for i, arguments in enumerate(several):
            try:
                KERNELS[op](*arguments)
                raised[f"{op} {i + 1}"] = "nothing"
            except Exception as error:
                raised[f"{op} {i + 1}"] = type(error).__name__
    return raised


def main(part: str) -> None:
    if part == "refusals":
        from gpkernels.triton import KERNELS

        print(json.dumps({"kernels": sorted(KERNELS), "raised": refusals()}))
        return
    guard, dtype = ("", part) if part in DTYPES else (part, "float32")
    found = {}
    for name, op, arguments in cases():
        if f" of {dtype}" not in name or (guard and not any(place in name for place in GUARDED)):
            continue
        print(name, file=sys.stderr, flush=True)  # the last line says which case a forbidden access killed
        found[name] = [str(x) for x in run(op, arguments, guard)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
