"""The contract of every op, for every op and backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves, tree_map

import gpkernels as gpk
from cases import raw_arguments
from gpkernels import ops
from gpkernels.ops.tensors import accumulation_dtype
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
