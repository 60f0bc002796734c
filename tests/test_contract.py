"""The contract of every op, for every op and backend."""

from __future__ import annotations

import inspect
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves, tree_map

import gpkernels as gpk
from cases import raw_arguments
from gpkernels import ops
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_backward_op, gradient_norm_penalty_op
from gpkernels.ops.interpolate import interpolate_op
from gpkernels.ops.relativistic_loss import relativistic_loss_op
from gpkernels.ops.score_loss import (
    ScoreLoss,
    score_loss_backward_op,
    score_loss_backward_reference,
    score_loss_op,
    score_loss_reference,
)
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.ops.weights import rmsprop_op
from gpkernels.verify.cases import CASES, DTYPES, LAYOUTS, PLACES, SHAPES, Case, laid_out


def _value_and_gradients(function, inputs: list[Tensor], case: Case) -> list[Tensor]:
    leaves = case.differentiable([x.detach() for x in inputs])
    everything = iter(leaves)
    value = function(*[next(everything) if kind != "e" else x for x, kind in zip(inputs, case.kinds, strict=True)])
    cotangent = torch.linspace(0.5, 1.5, max(value.numel(), 1), dtype=torch.float64).reshape(value.shape)
    return [value, *torch.autograd.grad(value, leaves, cotangent.to(value.dtype), allow_unused=True)]


def _error(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative 2-norm errors; of a mean of numbers of size one, the absolute error if it cancels to less than one."""
    floors = (1.0 if e.dim() == 0 else 1e-300 for e in exact)
    triples = zip(got, exact, floors, strict=True)
    return [float(((g.double() - e).norm() / e.norm().clamp_min(floor)).detach()) for g, e, floor in triples]


@pytest.mark.parametrize(("shape", "layout"), PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_agree_with_float64(name: str, dtype: str, shape: str, layout: str, backend: str) -> None:
    case, kind = CASES[name], DTYPES[dtype]
    inputs = [
        x if which == "e" else laid_out(x, layout)
        for x, which in zip(case.inputs(SHAPES[shape], kind), case.kinds, strict=True)
    ]
    exact = _value_and_gradients(case.specification, [x.double() for x in inputs], case)
    ours = _value_and_gradients(case.function, inputs, case)
    plain = _value_and_gradients(case.specification, inputs, case)
    # Allows one rounding of the result, and of the difference that a penalty squares.
    floor = 4 * torch.finfo(kind).eps
    for got, ordinary, value in zip(_error(ours, exact), _error(plain, exact), ours, strict=True):
        assert got <= 2 * ordinary + floor, (got, ordinary)
        assert value.dtype == (accumulation_dtype(kind) if value.dim() == 0 else value.dtype)


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivative_are_those_of_the_value(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs((3, 4), torch.float64)
    case.differentiable(inputs)
    assert gradcheck(case.function, inputs)
    assert gradgradcheck(case.function, inputs)


def test_derivatives_hold_when_only_one_side_is_differentiated(backend: str) -> None:
    for name in (
        "interpolate",
        "consistency_with_features",
        "lipschitz_consistency",
        "gan_discriminator_loss",
        "relativistic_critic_loss",
    ):
        case = CASES[name]
        for wanted in range(sum(kind != "e" for kind in case.kinds)):
            inputs = case.inputs((3, 4), torch.float64)
            inputs[wanted].requires_grad_()
            assert gradcheck(case.function, inputs), (name, wanted)
            assert gradgradcheck(case.function, inputs), (name, wanted)


def test_third_derivative_exists_and_is_right(backend: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def slope(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(gpk.gradient_norm_penalty(x), x, create_graph=True)
        return g

    assert gradgradcheck(slope, (x,))


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_the_derivative_along_the_tangent(name: str, backend: str) -> None:
    x, *others = CASES[name].inputs((4, 3), torch.float64)
    tangent = torch.randn_like(x)
    torch.manual_seed(1)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(CASES[name].function(forward_ad.make_dual(x, tangent), *others)).tangent
    leaf = x.detach().requires_grad_()
    torch.manual_seed(1)
    value = CASES[name].function(leaf, *others)
    cotangent = torch.randn_like(value)
    (gradient,) = torch.autograd.grad(value, leaf, cotangent)
    torch.testing.assert_close((found * cotangent).sum(), (gradient * tangent).sum())


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_of_transforms_agree(name: str) -> None:
    x, *others = CASES[name].inputs((2, 3), torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        y: torch.Tensor = CASES[name].function(x, *others)
        return y.square().sum()

    by_reverse = torch.autograd.functional.hessian(value, x)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacrev(value))(x), by_reverse)
    torch.testing.assert_close(torch.func.hessian(value)(x), by_reverse)


@pytest.mark.parametrize("name", ops.ALL)
def test_raw_op_passes_opcheck(name: str) -> None:
    for arguments in raw_arguments()[name]:
        torch.library.opcheck(ops.ALL[name].overload, arguments)


@pytest.mark.parametrize("name", sorted(name for name in ops.ALL if not ops.ALL[name].overload._schema.is_mutable))
def test_raw_op_gives_the_references_numbers(name: str) -> None:
    for arguments in raw_arguments()[name]:
        ours, exact = ops.ALL[name](*arguments), ops.ALL[name].implementation(*arguments)
        torch.testing.assert_close(ours, exact, check_stride=True)


@pytest.mark.parametrize("name", ops.ALL)
def test_raw_op_is_traced_for_cuda_tensors_where_there_is_no_gpu(name: str) -> None:
    def fake(x: object) -> object:
        is_tensor = isinstance(x, Tensor)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if is_tensor else x

    for arguments in raw_arguments()[name]:
        with FakeTensorMode():
            found = ops.ALL[name].overload(*tree_map(fake, arguments))
        tensors = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        assert all(x.device.type == "cuda" for x in tensors)


@pytest.mark.parametrize("name", CASES)
def test_exports_with_the_same_numbers(name: str) -> None:
    case = CASES[name]
    inputs = [x.detach() for x in case.inputs((3, 4), torch.float32)]

    class Called(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return case.function(*tensors)

    exported = torch.export.export(Called(), tuple(inputs))
    assert "gpkernels" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs), case.function(*inputs))


def test_every_raw_op_has_arguments_to_check() -> None:
    assert set(raw_arguments()) == set(ops.ALL)


@pytest.mark.parametrize("name", CASES)
def test_compiles_as_one_graph_with_the_same_numbers(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs((3, 4), torch.float32)
    torch.compiler.reset()  # cases share code, of which Dynamo compiles so many versions and no more
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager", dynamic=False)
    eager, traced = (_value_and_gradients(f, inputs, case) for f in (case.function, compiled))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_func_grad_and_vmap_equal_a_loop(name: str, backend: str) -> None:
    case = CASES[name]
    batches = [torch.stack(pair) for pair in zip(*(case.inputs((3, 4), torch.float64) for _ in range(3)), strict=True)]

    def total(*tensors: Tensor) -> Tensor:
        return case.function(*tensors).sum()

    mapped = torch.func.vmap(torch.func.grad(total))(*batches)
    for i in range(3):
        torch.testing.assert_close(mapped[i], torch.func.grad(total)(*[b[i] for b in batches]))
    jacobian = torch.func.jacrev(torch.func.grad(total))(*[b[0] for b in batches])
    assert torch.isfinite(jacobian).all()


@pytest.mark.parametrize("name", CASES)
def test_batched_cotangents_equal_a_loop(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs((3, 4), torch.float64)
    leaves = case.differentiable(inputs)
    value = case.function(*inputs)
    first = torch.autograd.grad(value, leaves, torch.ones_like(value), create_graph=True)
    for y in (value, *[g for g in first if g.requires_grad]):
        cotangents = torch.randn(2, *y.shape, dtype=y.dtype)
        options = {"retain_graph": True, "allow_unused": True}
        mapped = torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True, **options)
        for i, cotangent in enumerate(cotangents):
            one = torch.autograd.grad(y, leaves, cotangent, **options)
            torch.testing.assert_close([None if g is None else g[i] for g in mapped], list(one))


@pytest.mark.parametrize("name", CASES)
def test_special_values_come_out_as_in_the_reference(name: str, backend: str) -> None:
    case = CASES[name]
    for special in (0.0, float("inf"), float("nan")):
        inputs = case.inputs((4, 3), torch.float32)
        for x, kind in zip(inputs, case.kinds, strict=True):
            if kind != "e":
                x[1] = special
        ours = _value_and_gradients(case.function, inputs, case)
        exact = _value_and_gradients(case.specification, [x.double() for x in inputs], case)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_zero_input_gives_zero_gradient_and_no_nan(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = [torch.zeros_like(x) for x in case.inputs((4, 3), torch.float32)]
    value, *grads = _value_and_gradients(case.function, inputs, case)
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(g).all() for g in grads)
    if name.startswith(("penalty", "consistency", "lipschitz")):
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name: str, backend: str) -> None:
    case = CASES[name]
    for shape in ((5, 70001), (5000, 33)):
        inputs = case.inputs(shape, torch.float32)
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(_value_and_gradients(case.function, inputs, case))
        if backend == "reference":  # PyTorch's own sums promise this for a fixed number of threads only
            results = results[:1]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_autocast_keeps_losses_in_float32(name: str, backend: str) -> None:
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs((3, 4), dtype)
        with torch.autocast("cpu", torch.bfloat16):
            value = case.function(*inputs)
        assert value.dtype == (dtype if name == "interpolate" else torch.float32)


def test_mixed_dtypes_promote_as_in_pytorch(backend: str) -> None:
    a, b = torch.randn(3, 2), torch.randn(3, 2).bfloat16()
    assert gpk.interpolate(a, b).dtype == torch.float32
    assert gpk.wgan_critic_loss(a.double(), b).dtype == torch.float64


def test_rows_of_no_elements_are_harmless(backend: str) -> None:
    empty = torch.empty(3, 0, requires_grad=True)
    gpk.gradient_norm_penalty(empty).backward()
    assert empty.grad.shape == (3, 0)
    assert gpk.interpolate(torch.empty(3, 0), torch.empty(3, 0)).shape == (3, 0)
    assert gpk.add_instance_noise(torch.empty(3, 0), 0.5).shape == (3, 0)


@pytest.mark.parametrize("dim", [-1, 1, 0, (1, 2), (0, -1), [3, 1], (1, 2, 3)], ids=str)
def test_a_norm_is_over_the_axes_that_are_named(dim: Any, backend: str) -> None:
    for layout in LAYOUTS:
        x = laid_out(torch.randn(2, 3, 4, 5, dtype=torch.float64), layout)
        expected = (torch.linalg.vector_norm(x, dim=dim) - 1).abs() ** 1.5
        for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
            found = gpk.gradient_norm_penalty(x, dim=dim, reduction=reduction, power=1.5)
            torch.testing.assert_close(found, value)
    leaf = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    for reduction in ("none", "mean"):
        function = partial(gpk.gradient_norm_penalty, dim=dim, reduction=reduction)
        assert gradcheck(function, leaf, fast_mode=True)
        assert gradgradcheck(function, leaf, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_of_a_pack_have_one_norm(layout: str, backend: str) -> None:
    x = laid_out(torch.randn(6, 3, 2, 2, dtype=torch.float64), layout)
    leaf = x.detach().requires_grad_()
    for pack in (1, 2, 6):
        expected = (x.reshape(6 // pack, -1).norm(2, 1) - 1) ** 2
        for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
            torch.testing.assert_close(gpk.gradient_norm_penalty(x, pack=pack, reduction=reduction), value)
        if layout != "expanded":  # whose elements cannot be moved apart
            function = partial(gpk.gradient_norm_penalty, pack=pack)
            assert gradcheck(function, leaf, fast_mode=True)
            assert gradgradcheck(function, leaf, fast_mode=True)


@pytest.mark.parametrize("target", [0.0, 5.0])
@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_derivatives_are_free_of_nan_at_zero_and_at_the_target(
    power: float, one_sided: bool, target: float, backend: str
) -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-8.0, 6.0], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    value = gpk.gradient_norm_penalty(x, target, one_sided=one_sided, reduction="none", power=power)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, torch.randn_like(first), create_graph=True)
    (third,) = torch.autograd.grad((second * x).sum(), x)
    assert all(t.isfinite().all() for t in (value, first, second, third))
    assert (first[0] == 0).all()
    assert value[1] == (0 if target else 5**power)
    assert (first[1] == 0).all() == (target == 5)
    expected = power * (10 - target) ** (power - 1) * x.detach()[2] / 10
    torch.testing.assert_close(first.detach()[2], expected)


def test_scores_are_paired_and_not_broadcast(backend: str) -> None:
    for real, fake in ((SCORE, SCORE[:, None]), (FLAT, FLAT[:1]), (FLAT, torch.tensor(1.0))):
        for call in (gpk.relativistic_critic_loss, gpk.relativistic_generator_loss, relativistic_loss_op):
            with pytest.raises(ValueError, match="_scores: expected"):
                call(real, fake)
    with pytest.raises((ValueError, RuntimeError), match="fake_scores: "):
        torch.ops.gpkernels.relativistic_loss_backward(ONE, SCORE, SCORE[:, None])


INT, FLAT = torch.ones(3, 2, dtype=torch.int64), torch.randn(3, 2)
NOBODY, SCORE = torch.empty(0, 2), torch.randn(3)
BAD = {
    "interpolate of integers": (lambda: gpk.interpolate(INT, INT), TypeError, "real.*int64"),
    "interpolate of no tensor": (lambda: gpk.interpolate(FLAT, 3.0), TypeError, "fake.*float"),
    "interpolate of two shapes": (lambda: gpk.interpolate(FLAT, FLAT[:2]), ValueError, "fake.*3, 2.*2, 2"),
    "interpolate of an empty batch": (lambda: gpk.interpolate(NOBODY, NOBODY), ValueError, "real.*0, 2"),
    "interpolate with one eps": (lambda: gpk.interpolate(FLAT, FLAT, torch.rand(1)), ValueError, "eps.*per sample"),
    "interpolate with eps per pixel": (lambda: gpk.interpolate(FLAT, FLAT, torch.rand(3, 2)), ValueError, "eps"),
    "interpolate across devices": (lambda: gpk.interpolate(FLAT, FLAT.to("meta")), ValueError, "fake.*meta"),
    "a generator of the wrong type": (lambda: gpk.interpolate(FLAT, FLAT, generator=3), TypeError, "generator.*int"),
    "noise of negative sigma": (lambda: gpk.add_instance_noise(FLAT, -1.0), ValueError, "sigma.*-1"),
    "noise of NaN sigma": (lambda: gpk.add_instance_noise(FLAT, float("nan")), ValueError, "sigma.*nan"),
    "noise of a text sigma": (lambda: gpk.add_instance_noise(FLAT, "1"), TypeError, "sigma.*str"),
    "penalty of a scalar": (lambda: gpk.gradient_norm_penalty(torch.tensor(1.0)), ValueError, "grad"),
    "penalty of integers": (lambda: gpk.gradient_norm_penalty(INT), TypeError, "grad.*int64"),
    "penalty of a sparse tensor": (lambda: gpk.gradient_norm_penalty(FLAT.to_sparse()), TypeError, "grad.*sparse"),
    "penalty with a negative target": (lambda: gpk.gradient_norm_penalty(FLAT, -1.0), ValueError, "target.*-1"),
    "penalty with an infinite target": (lambda: gpk.gradient_norm_penalty(FLAT, float("inf")), ValueError, "target"),
    "penalty with a foreign reduction": (
        lambda: gpk.gradient_norm_penalty(FLAT, reduction="max"),
        ValueError,
        "reduction.*'max'",
    ),
    "penalty with a list of reductions": (
        lambda: gpk.gradient_norm_penalty(FLAT, reduction=["mean"]),
        ValueError,
        r"reduction.*\['mean'\]",
    ),
    "penalty on a side of text": (
        lambda: gpk.gradient_norm_penalty(FLAT, one_sided="no"),
        TypeError,
        "one_sided.*'no'",
    ),
    "penalty on a side of NaN": (
        lambda: gpk.gradient_norm_penalty(FLAT, one_sided=float("nan")),
        TypeError,
        "one_sided.*nan",
    ),
    "penalty on a side for each sample": (
        lambda: gpk.gradient_norm_penalty(FLAT, one_sided=INT),
        TypeError,
        "one_sided.*tensor",
    ),
    "penalty of a power below 1": (lambda: gpk.gradient_norm_penalty(FLAT, power=0.5), ValueError, "power.*0.5"),
    "penalty of an infinite power": (
        lambda: gpk.gradient_norm_penalty(FLAT, power=float("inf")),
        ValueError,
        "power.*inf",
    ),
    "penalty of a NaN power": (lambda: gpk.gradient_norm_penalty(FLAT, power=float("nan")), ValueError, "power.*nan"),
    "penalty of a text power": (lambda: gpk.gradient_norm_penalty(FLAT, power="2"), TypeError, "power.*str"),
    "penalty over a foreign axis": (lambda: gpk.gradient_norm_penalty(FLAT, dim=2), ValueError, "dim.*2 axes.*got 2"),
    "penalty over one axis twice": (
        lambda: gpk.gradient_norm_penalty(FLAT[None], dim=(2, -1)),
        ValueError,
        r"dim.*each once.*\(2, -1\)",
    ),
    "penalty over all axes": (lambda: gpk.gradient_norm_penalty(FLAT, dim=(0, 1)), ValueError, r"dim.*\(0, 1\)"),
    "penalty over no axes": (lambda: gpk.gradient_norm_penalty(FLAT, dim=()), ValueError, r"dim.*\(\)"),
    "penalty over half an axis": (lambda: gpk.gradient_norm_penalty(FLAT, dim=0.5), TypeError, "dim.*float"),
    "penalty over axes of text": (lambda: gpk.gradient_norm_penalty(FLAT, dim=("1",)), TypeError, "dim.*str"),
    "penalty of no rows": (lambda: gpk.gradient_norm_penalty(NOBODY, dim=1), ValueError, "grad.*0, 2"),
    "penalty over an axis of integers": (lambda: gpk.gradient_norm_penalty(INT, dim=1), TypeError, "grad.*int64"),
    "penalty of packs of nothing": (lambda: gpk.gradient_norm_penalty(FLAT, pack=0), ValueError, "pack.*1.*0"),
    "penalty of true packs": (lambda: gpk.gradient_norm_penalty(FLAT, pack=True), TypeError, "pack.*bool"),
    "penalty of half packs": (lambda: gpk.gradient_norm_penalty(FLAT, pack=1.5), TypeError, "pack.*float"),
    "penalty of a part of a pack": (lambda: gpk.gradient_norm_penalty(FLAT, pack=2), ValueError, "pack.*3, got 2"),
    "penalty of packs over an axis": (
        lambda: gpk.gradient_norm_penalty(FLAT, dim=1, pack=3),
        ValueError,
        "pack.*dim.*3",
    ),
    "penalty of packs of integers": (lambda: gpk.gradient_norm_penalty(INT, pack=3), TypeError, "grad.*int64"),
    "consistency of two batches": (lambda: gpk.consistency_term(SCORE, SCORE[:2]), ValueError, "score2"),
    "consistency of one feature": (lambda: gpk.consistency_term(SCORE, SCORE, FLAT), ValueError, "features2.*None"),
    "consistency of foreign features": (
        lambda: gpk.consistency_term(SCORE, SCORE, FLAT[:2], FLAT[:2]),
        ValueError,
        "features1.*batch",
    ),
    "consistency of negative margin": (
        lambda: gpk.consistency_term(SCORE, SCORE, margin=-0.1),
        ValueError,
        "margin.*-0.1",
    ),
    "consistency of negative weight": (
        lambda: gpk.consistency_term(SCORE, SCORE, feature_weight=-1),
        ValueError,
        "feature_weight",
    ),
    "lipschitz of negative margin": (
        lambda: gpk.lipschitz_consistency(SCORE, SCORE, FLAT, FLAT, margin=-1),
        ValueError,
        "margin",
    ),
    "a loss of integers": (lambda: gpk.wgan_critic_loss(INT, INT), TypeError, "real_scores"),
    "a hinge loss of integers": (lambda: gpk.hinge_critic_loss(SCORE, INT), TypeError, "fake_scores.*int64"),
    "a loss of an infinite real target": (
        lambda: gpk.least_squares_critic_loss(SCORE, SCORE, real_target=float("inf")),
        ValueError,
        "real_target.*inf",
    ),
    "a loss of a NaN fake target": (
        lambda: gpk.least_squares_critic_loss(SCORE, SCORE, fake_target=float("nan")),
        ValueError,
        "fake_target.*nan",
    ),
    "a loss of a text target": (
        lambda: gpk.least_squares_generator_loss(SCORE, target="1"),
        TypeError,
        "target.*str",
    ),
    "a loss of unpaired scores": (
        lambda: gpk.relativistic_critic_loss(SCORE, SCORE[:2]),
        ValueError,
        r"fake_scores: .*real_scores, \(3,\).*\(2,\)",
    ),
    "a generator's loss of unpaired scores": (
        lambda: gpk.relativistic_generator_loss(SCORE, SCORE[:, None]),
        ValueError,
        r"real_scores: .*fake_scores, \(3, 1\).*\(3,\)",
    ),
    "a loss of pairs of nothing": (
        lambda: gpk.relativistic_critic_loss(NOBODY, NOBODY),
        ValueError,
        "real_scores.*0, 2",
    ),
    "a loss of pairs across devices": (
        lambda: gpk.relativistic_critic_loss(SCORE, SCORE.to("meta")),
        ValueError,
        "fake_scores.*meta",
    ),
    "a loss of nothing": (lambda: gpk.wgan_generator_loss(torch.empty(0)), ValueError, "fake_scores"),
    "clipping by a negative number": (lambda: gpk.clip_weights_([FLAT.clone()], -0.1), ValueError, "c: .*-0.1"),
    "clipping integers": (lambda: gpk.clip_weights_([FLAT.clone(), INT], 0.1), TypeError, r"params\[1\]"),
    "clipping nothing": (lambda: gpk.clip_weights_(None, 0.1), TypeError, "params.*NoneType"),
    "several backends": (lambda: gpk.set_backend(["cpu"]), ValueError, r"backend.*\['cpu'\]"),
    "a foreign backend": (lambda: gpk.set_backend("tpu"), ValueError, "backend.*tpu"),
}


ONE = torch.ones(())
AFTER = len(ScoreLoss)
KINDS = rf"expected 0 \(identity\), 1 \(negative\), .*{AFTER - 1} \({ScoreLoss(AFTER - 1).name.lower()}\), got "
BAD_CODES = {
    "a loss of a kind above all": (lambda: score_loss_op([SCORE], [70], [0.0]), rf"kinds: {KINDS}70"),
    "a loss of the kind after the last": (lambda: score_loss_op([SCORE], [AFTER], [0.0]), rf"kinds: {KINDS}{AFTER}"),
    "a loss of a negative kind": (lambda: score_loss_op([SCORE], [-1], [0.0]), rf"kinds: {KINDS}-1"),
    "a loss of a bad second kind": (lambda: score_loss_op([SCORE, SCORE], [0, 9], [0.0, 0.0]), rf"kinds: {KINDS}9"),
    "a loss of too few kinds": (lambda: score_loss_op([SCORE, SCORE], [0], [0.0, 0.0]), "kinds: .* 2 scores, got 1"),
    "a loss of too few targets": (lambda: score_loss_op([SCORE], [AFTER - 1], []), "targets: .* 1 scores, got 0"),
    "a loss of no scores": (lambda: score_loss_op([], [], []), "scores: .* none"),
    "a slope of a kind above all": (
        lambda: score_loss_backward_op(ONE, [SCORE], [AFTER], [0.0]),
        rf"kinds: {KINDS}{AFTER}",
    ),
    "a slope of a negative kind": (lambda: score_loss_backward_op(ONE, [SCORE], [-1], [0.0]), rf"kinds: {KINDS}-1"),
    "a slope of no scores": (lambda: score_loss_backward_op(ONE, [], [], []), "scores: .* none"),
    "a mapped loss": (
        lambda: torch.func.vmap(lambda s: score_loss_op([s], [AFTER], [0.0]))(FLAT),
        rf"kinds: {KINDS}{AFTER}",
    ),
    "a penalty of a foreign reduction": (
        lambda: gradient_norm_penalty_op(FLAT, 1.0, False, 7, 2.0),
        r"reduction: expected 0 \(none\), 1 \(mean\), 2 \(sum\), got 7",
    ),
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_a_code_that_names_nothing_is_refused(name: str, backend: str) -> None:
    call, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", [-1, AFTER])
def test_a_code_that_names_nothing_is_refused_by_the_registered_kernel(kind: int) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"kinds: expected .*, got {kind}"):
        torch.ops.gpkernels.score_loss([SCORE, SCORE], [0, kind], [0.0, 0.0])
    with pytest.raises((ValueError, RuntimeError), match=f"kinds: expected .*, got {kind}"):
        torch.ops.gpkernels.score_loss_backward(ONE, [SCORE], [kind], [0.0])
    with pytest.raises((ValueError, RuntimeError), match=f"reduction: expected .*, got {kind}"):
        torch.ops.gpkernels.gradient_norm_penalty(FLAT, 1.0, False, kind, 2.0)


def test_a_code_that_names_nothing_is_refused_while_tracing_and_by_the_specification() -> None:
    for call in (score_loss_op.overload, score_loss_reference):
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=f"kinds: {KINDS}{AFTER}"):
            call([mode.from_tensor(SCORE)], [AFTER], [0.0])
    with pytest.raises(ValueError, match=f"kinds: {KINDS}{AFTER}"):
        score_loss_backward_reference(ONE, [SCORE], [AFTER], [0.0])


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, backend: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_clipped_when_a_later_tensor_is_bad(backend: str) -> None:
    first = torch.full((3,), 5.0)
    with pytest.raises(TypeError):
        gpk.clip_weights_([first, INT], 0.1)
    with pytest.raises(RuntimeError, match=r"params\[1\]: .*overlap.*\(4,\), strides \(0,\)"):
        gpk.clip_weights_([first, torch.ones(1).expand(4)], 0.1)
    assert (first == 5.0).all()


@pytest.mark.parametrize("number", [np.float32(0.5), np.float16(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
def test_a_number_may_be_of_any_real_type(number: Any) -> None:
    weight = torch.ones(3)
    gpk.clip_weights_(weight, number)
    assert weight.tolist() == [0.5] * 3


def test_raw_ops_refuse_shapes_that_would_read_out_of_bounds() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"expected shape \(.*, got \("):
        interpolate_op.overload(x, torch.randn(3, 3), torch.rand(3))
    with pytest.raises(RuntimeError, match="one number per row"):
        interpolate_op.overload(x, x, torch.rand(2))
    with pytest.raises(RuntimeError, match="one number per row"):
        gradient_norm_penalty_backward_op.overload(torch.tensor(1.0), x, torch.rand(2))
    with pytest.raises(RuntimeError, match=r"expected shape \(.*, got \("):
        rmsprop_op.overload([x], [x[:2]], [x], [], [], 0.1, 0.9, 1e-8, 0.0, 0.0, False, None)


def test_every_public_function_states_its_errors() -> None:
    for name in gpk.__all__:
        thing = getattr(gpk, name)
        if inspect.isfunction(thing):
            assert thing.__doc__, name
