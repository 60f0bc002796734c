"""Fast paths from Python to the C++ kernels: their results, and the calls that they decline."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import gpkernels as gpk
from cases import raw_arguments
from gpkernels import backends, ops
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_op
from gpkernels.ops.interpolate import interpolate_op
from gpkernels.ops.score_loss import score_loss_op
from gpkernels.ops.weights import clip_weights_op
from installed import output
from watchers import PassesFunctions, PassesOps

pytestmark = pytest.mark.skipif(backends.direct is None, reason="the direct way is not built")

OPEN = [name for name in ops.ALL if backends.running_op(name, "cpu") == "cpu"]


def interpolated(real: Any, fake: Any, eps: Any) -> Any:
    return interpolate_op.direct(real, fake, eps)


def three(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 3, **options), torch.randn(4, 3, **options), torch.rand(4, **options)


@pytest.mark.parametrize("name", OPEN)
def test_it_gives_the_bits_that_the_dispatcher_gives(name: str) -> None:
    op = ops.ALL[name]
    for arguments in raw_arguments()[name]:
        mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
        got, expected = op.direct(*mine), op.overload(*theirs)
        assert got is not NotImplemented
        assert type(got) is type(expected)
        for ours, other in zip(tree_leaves((got, mine)), tree_leaves((expected, theirs)), strict=True):
            if isinstance(other, Tensor):
                assert ours.dtype == other.dtype
                assert ours.stride() == other.stride()
                assert torch.equal(ours, other)
            else:
                assert ours == other


@pytest.mark.parametrize("name", OPEN)
def test_it_keeps_no_reference_to_what_it_was_given_or_gave(name: str) -> None:
    arguments = raw_arguments()[name][0]
    held = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    counts = [sys.getrefcount(x) for x in held]
    for _ in range(3):
        given = tree_leaves(ops.ALL[name].direct(*arguments))
    assert [sys.getrefcount(x) for x in held] == counts
    assert all(sys.getrefcount(x) <= 3 for x in given if isinstance(x, Tensor))  # of the list, of x and of the call


WATCHERS: dict[str, Callable[[], Any]] = {
    "a dispatch mode": PassesOps,
    "a function mode": PassesFunctions,
    "fake tensors": FakeTensorMode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "the reference backend": lambda: gpk.backend("reference"),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_it_declines_while_something_looks_on(watcher: str) -> None:
    x, y, eps = three()
    assert interpolated(x, y, eps) is not NotImplemented
    with WATCHERS[watcher]():
        assert interpolated(x, y, eps) is NotImplemented
    assert interpolated(x, y, eps) is not NotImplemented


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vjp", "functionalize"])
def test_it_declines_under_every_transform(transform: str) -> None:
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        seen.append(interpolated(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)))
        return x.sum()

    x = torch.ones(2, 3)
    {
        "grad": lambda: torch.func.grad(function)(x),
        "vmap": lambda: torch.func.vmap(function)(x),
        "jvp": lambda: torch.func.jvp(function, (x,), (x,)),
        "vjp": lambda: torch.func.vjp(function, x),
        "functionalize": lambda: torch.func.functionalize(function)(x),
    }[transform]()
    assert seen == [NotImplemented]


def test_it_declines_while_a_tracer_records() -> None:
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        seen.append(interpolated(x, x, torch.ones(2)))
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(function, torch.ones(2, 3), check_trace=False)
    assert seen == [NotImplemented]


class _Own(Tensor):
    pass


ODD: dict[str, Callable[[], tuple[Any, ...]]] = {
    "a subclass": lambda: (torch.randn(4, 3).as_subclass(_Own), *three()[1:]),
    "a meta tensor": lambda: three(device="meta"),
    "a sparse tensor": lambda: (torch.randn(4, 3).to_sparse(), *three()[1:]),
    "a negative view": lambda: (torch._neg_view(torch.randn(4, 3)), *three()[1:]),
    "a leaf that wants its gradient": lambda: (torch.randn(4, 3, requires_grad=True), *three()[1:]),
    "a result that has a graph": lambda: (torch.randn(4, 3, requires_grad=True) * 2, *three()[1:]),
    "two dtypes": lambda: (torch.randn(4, 3, dtype=torch.float64), *three()[1:]),
    "integers": lambda: (torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64), torch.ones(4)),
    "other shapes": lambda: (torch.randn(4, 3), torch.randn(3, 4), torch.ones(4)),
    "an eps for another batch": lambda: (*three()[:2], torch.ones(3)),
    "an eps in a row": lambda: (*three()[:2], torch.ones(1, 4)),
    "no batch": lambda: (torch.randn(0, 3), torch.randn(0, 3), torch.ones(0)),
    "a list": lambda: ([1.0], *three()[1:]),
    "None": lambda: (None, *three()[1:]),
    "too few arguments": lambda: three()[:2],
    "too many arguments": lambda: (*three(), True),
}


@pytest.mark.parametrize("kind", ODD)
def test_it_declines(kind: str) -> None:
    assert interpolate_op.direct(*ODD[kind]()) is NotImplemented


def test_it_declines_more_than_the_ops_own_arguments_before_it_writes() -> None:
    weight = torch.ones(5)
    assert clip_weights_op.direct([weight], 0.5, [weight.clone().requires_grad_()], [0]) is NotImplemented
    assert weight.eq(1).all()


def test_it_declines_a_tensor_with_a_tangent() -> None:
    x, y, eps = three()
    with forward_ad.dual_level():
        assert interpolated(forward_ad.make_dual(x, y), y, eps) is NotImplemented


@pytest.mark.parametrize(
    "arguments",
    [(1, False, 0), (1.0, 0, 0), (1.0, False, 0.0), (1.0, False, True), (1.0, False, 2**70), ("1", False, 0)],
    ids=["an int for a float", "an int for a bool", "a float for an int", "a bool for an int", "too large", "a text"],
)
def test_it_declines_a_number_of_another_kind(arguments: tuple[Any, ...]) -> None:
    assert gradient_norm_penalty_op.direct(torch.randn(4, 3), *arguments, 2.0) is NotImplemented


def test_it_takes_weights_where_no_graph_is_wanted_and_writes_into_them_always() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    assert gradient_norm_penalty_op.direct(weight, 1.0, False, 0, 2.0) is NotImplemented
    with torch.no_grad():
        assert gradient_norm_penalty_op.direct(weight, 1.0, False, 0, 2.0) is not NotImplemented
    assert clip_weights_op.direct([weight], 0.1) is None
    assert weight.detach().abs().max() <= 0.1


def test_clipping_counts_as_a_change_of_the_weight() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    before, loss = weight._version, (weight**2).sum()
    gpk.clip_weights_([weight], 0.1)
    assert weight._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_it_gives_has_no_graph_and_can_start_one() -> None:
    mixed = interpolated(*three())
    assert not mixed.requires_grad
    mixed.requires_grad_()
    gpk.gradient_norm_penalty(mixed).backward()
    assert mixed.grad is not None


def test_a_profiler_sees_the_op() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        interpolated(*three())
    assert "gpkernels::interpolate" in {event.key for event in profile.key_averages()}


def test_it_declines_what_no_op_is_called() -> None:
    assert backends.direct is not None
    with pytest.raises(ValueError, match="gpkernels::nothing"):
        backends.direct("gpkernels::nothing", backends._chosen)
    number: Any = 7
    for arguments in ((number, backends._chosen), ("gpkernels::interpolate", number), ("gpkernels::interpolate",)):
        with pytest.raises(TypeError):
            backends.direct(*arguments)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the fast paths until the end of a test."""
    for name in ("direct", "deliver", "program"):
        monkeypatch.setattr(backends, name, None)


def test_binaries_for_another_torch_are_not_used(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert "this is 2.99.0" in str(backends._load_fast_paths())
    assert (backends.direct, backends.deliver, backends.program) == (None, None, None)


def test_a_binary_that_an_older_build_left_is_not_used(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    monkeypatch.setattr("gpkernels._direct.TORCH", "2.12.0")
    assert "_direct is for PyTorch 2.12.0" in str(backends._load_fast_paths())
    assert (backends.direct, backends.deliver) == (None, None)
    assert backends.program is not None


def test_weights_that_overlap_themselves_are_refused_before_others_are_changed() -> None:
    plain, overlapping = torch.ones(4, requires_grad=True), torch.ones(1).expand(4).requires_grad_()
    with pytest.raises(RuntimeError, match="overlap"):
        gpk.clip_weights_([plain, overlapping], 0.1)
    plain.grad = overlapping.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="overlap"):
        gpk.optim.RMSprop([plain, overlapping], lr=1e-2).step()
    assert plain.tolist() == [1.0] * 4


def test_weights_without_elements_overlap_nothing() -> None:
    gpk.clip_weights_([torch.empty_strided((0, 2), (2, 0)), torch.empty(0, 0, 2)], 0.1)


def test_ctrl_c_in_a_kernel_is_not_tried_again() -> None:
    code = (
        "import torch, gpkernels as gpk\n"
        "calls = []\n"
        "def kernel(*args):\n"
        "    calls.append(args)\n"
        "    raise KeyboardInterrupt\n"
        "library = torch.library.Library('gpkernels', 'IMPL')\n"
        "library.impl('interpolate', kernel, 'CPU', allow_override=True)\n"
        "try:\n"
        "    gpk.interpolate(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped after', len(calls))\n"
    )
    assert "stopped after 1" in output(code)


def test_without_its_binary_there_is_no_direct_way(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    monkeypatch.setitem(sys.modules, "gpkernels._direct", None)
    monkeypatch.delattr(gpk, "_direct")
    assert "built without _direct" in str(backends._load_fast_paths())
    assert (backends.direct, backends.deliver) == (None, None)


PUBLIC: dict[str, Callable[..., Tensor]] = {
    "interpolate": lambda x, y, eps: gpk.interpolate(x, y, eps),
    "gradient_norm_penalty": lambda x, y, eps: gpk.gradient_norm_penalty(x, 0.5, one_sided=True),
    "consistency_term": lambda x, y, eps: gpk.consistency_term(x[:, 0], y[:, 0], x, y),
    "lipschitz_consistency": lambda x, y, eps: gpk.lipschitz_consistency(x[:, 0], y[:, 0], x, y),
    "wgan_critic_loss": lambda x, y, eps: gpk.wgan_critic_loss(x, y),
    "gan_discriminator_loss": lambda x, y, eps: gpk.gan_discriminator_loss(x, y),
    "least_squares_critic_loss": lambda x, y, eps: gpk.least_squares_critic_loss(x, y, fake_target=-1),
    "relativistic_critic_loss": lambda x, y, eps: gpk.relativistic_critic_loss(x, y),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_take_it_and_give_the_same_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = three()
    stem = name.replace("_critic", "")
    op = ops.ALL.get(stem, score_loss_op)
    taken: list[Any] = []

    def counted(*args: Any) -> Any:
        taken.append(bound(*args))
        return taken[-1]

    bound = op.recorded
    monkeypatch.setattr(op, "recorded", counted)
    with_it = PUBLIC[name](*arguments)
    assert len(taken) == 1
    assert taken[0] is not NotImplemented
    monkeypatch.setattr(op, "recorded", backends.declined)
    assert torch.equal(with_it, PUBLIC[name](*arguments))


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_it_is_open_where_cpu_tensors_take_the_kernels(name: str) -> None:
    with gpk.backend(name) if name != "auto" else nullcontext():
        closed = interpolated(*three()) is NotImplemented
    assert closed == (name == "reference")


@pytest.mark.parametrize("name", ["auto", "cpu", "reference", "triton"])
def test_it_is_open_where_the_process_gives_cpu_tensors_the_kernels(name: str) -> None:
    try:
        gpk.set_backend(name)
        closed = interpolated(*three()) is NotImplemented
    finally:
        gpk.set_backend("auto")
    assert closed == (name in ("reference", "triton"))


def test_a_thread_that_chose_another_backend_finds_it_closed_and_others_find_it_open() -> None:
    arguments = three()
    with ThreadPoolExecutor(1) as other:
        with gpk.backend("reference"):
            assert interpolated(*arguments) is NotImplemented
            assert other.submit(interpolated, *arguments).result() is not NotImplemented
            with gpk.backend("cpu"):
                assert interpolated(*arguments) is not NotImplemented
            with gpk.backend("auto"):
                assert interpolated(*arguments) is not NotImplemented
            assert interpolated(*arguments) is NotImplemented
        assert interpolated(*arguments) is not NotImplemented
