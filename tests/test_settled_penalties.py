"""Penalties that are made like one before: whatever decided how it was made may change before the next."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import gpkernels as gpk
from comparing import assert_same, batch, gradients
from critics import mlp
from gpkernels import backends
from scored import WIDTH, N, Scored, functions_called

pytestmark = [
    pytest.mark.skipif(backends.program is None, reason="the loop in C++ is not built"),
    pytest.mark.usefixtures("rules_or_autograd"),
]

Penalty = Callable[..., Tensor]


def between(critic: Any, real: Tensor, fake: Tensor, eps: Tensor, **options: Any) -> Tensor:
    return gpk.gradient_penalty(critic, real, fake, eps=eps, **options)


def drawn(critic: Any, real: Tensor, fake: Tensor, eps: Tensor, **options: Any) -> Tensor:
    return gpk.gradient_penalty(critic, real, fake, **options)


def r1(critic: Any, real: Tensor, fake: Tensor, eps: Tensor, **options: Any) -> Tensor:
    return gpk.r1_penalty(critic, real, **options)


def r2(critic: Any, real: Tensor, fake: Tensor, eps: Tensor, **options: Any) -> Tensor:
    return gpk.r2_penalty(critic, fake, **options)


def dragan(critic: Any, real: Tensor, fake: Tensor, eps: Tensor, **options: Any) -> Tensor:
    return gpk.dragan_penalty(critic, real, **options)


def eikonal(critic: Any, real: Tensor, fake: Tensor, eps: Tensor, **options: Any) -> Tensor:
    return gpk.eikonal_loss(critic, real, **options)


PENALTIES: list[Penalty] = [between, drawn, r1, r2, dragan, eikonal]
OPTIONS: dict[str, tuple[list[Penalty], dict[str, Any]]] = {
    "target": ([between, drawn, dragan], {"target": 0.5}),
    "a whole target": ([between, drawn, dragan], {"target": 1}),
    "one_sided": ([between], {"one_sided": True}),
    "power": ([between, eikonal], {"power": 3.0}),
    "scale": ([dragan], {"scale": 2.0}),
    "sum": (PENALTIES, {"reduction": "sum"}),
    "none": (PENALTIES, {"reduction": "none"}),
    "pack": ([drawn, r1, r2, dragan], {"pack": 2}),
    "positional": (PENALTIES, {"critic_args": (0.5,)}),
    "a list": (PENALTIES, {"critic_args": [0.5]}),
    "keyword": (PENALTIES, {"critic_kwargs": {"shift": 0.5}}),
}


def settled(penalty: Penalty, critic: Any = None, **options: Any) -> Any:
    """A critic whose penalties are made like the last one."""
    torch.manual_seed(0)
    critic = Scored().double().eval() if critic is None else critic
    for _ in range(6):
        penalty(critic, *batch(N, WIDTH), **options).backward()
    critic.zero_grad()
    return critic


def assert_as_new(penalty: Penalty, critic: Any, *given: Tensor, tolerance: float = 1e-11, **options: Any) -> None:
    """Three times the same as of a critic that nothing is known of, with the same numbers drawn."""
    for _ in range(3):
        torch.manual_seed(2)
        ours = penalty(critic, *given, **options)
        torch.manual_seed(2)
        with gpk.fast_double_backward():
            exact = penalty(critic, *given, **options)
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
        assert ours.requires_grad == exact.requires_grad
        if ours.requires_grad:
            weights = torch.linspace(1, 2, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
            assert_same(
                gradients((ours * weights).sum(), critic), gradients((exact * weights).sum(), critic), tolerance
            )


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_settled_penalty_asks_little(penalty: Penalty) -> None:
    critic = settled(penalty)
    given = batch(N, WIDTH)
    called = functions_called(partial(penalty, critic, *given))
    assert 3 <= len(called) <= (15 if penalty is dragan else 5)  # which draws its points in Python
    other = functions_called(partial(penalty, critic, *given, reduction="sum"))
    assert len(other) > 20


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_heeded(name: str) -> None:
    penalties, options = OPTIONS[name]
    for penalty in penalties:
        critic = settled(penalty)
        given = batch(N, WIDTH)
        assert_as_new(penalty, critic, *given, **options)
        settled(penalty, critic, **({} if name == "none" else options))
        assert_as_new(penalty, critic, *given, **options)
        assert_as_new(penalty, critic, *given)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("what", ["size", "grad", "samples", "layer", "frozen"])
def test_other_arguments_are_heeded(penalty: Penalty, what: str) -> None:
    critic = settled(penalty)
    given = batch(6 if what == "size" else N, WIDTH)
    if what == "samples":
        given[0].requires_grad_()
    if what == "layer":
        critic.top = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    if what == "frozen":
        critic.top.requires_grad_(False)
    if what != "grad":
        assert_as_new(penalty, critic, *given)
        return
    with torch.no_grad():
        torch.manual_seed(2)
        ours = penalty(critic, *given)
    assert not ours.requires_grad
    torch.manual_seed(2)
    torch.testing.assert_close(ours, penalty(critic, *given).detach())


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("mode", ["training", "autocast", "dtype", "backend", "dual level"])
def test_other_modes_are_heeded(penalty: Penalty, mode: str) -> None:
    critic = settled(penalty)
    given = batch(N, WIDTH)
    if mode == "training":
        critic.train()
        assert len({float(penalty(critic, *given).detach()) for _ in range(4)}) == 4  # a mask for each
    elif mode == "autocast":
        critic.float()
        given = [x.float() for x in given]
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert_as_new(penalty, critic, *given, tolerance=3e-2 if enabled else 1e-5)
    elif mode == "dtype":
        assert penalty(critic.float(), *[x.float() for x in given]).dtype == torch.float32
    elif mode == "backend":
        with gpk.backend("reference"):
            assert_as_new(penalty, critic, *given)
    elif penalty is not dragan:  # whose samples are constants
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, torch.ones_like(x)) for x in given]
            with pytest.raises((RuntimeError, TypeError)):
                penalty(critic, *dual)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_bad_arguments_are_refused_as_ever(penalty: Penalty) -> None:
    critic = settled(penalty)
    real, fake, eps = batch(N, WIDTH)
    empty = [x[:0] for x in (real, fake, eps)]
    with pytest.raises(ValueError, match="at least one sample"):
        penalty(critic, *empty)
    with pytest.raises(ValueError, match="reduction"):
        penalty(critic, real, fake, eps, reduction="median")
    for given in (torch.ones(2), torch.ones(()), None, 0.5):
        with pytest.raises(TypeError, match="critic_args"):
            penalty(critic, real, fake, eps, critic_args=given)
    with pytest.raises(TypeError, match="critic_kwargs"):
        penalty(critic, real, fake, eps, critic_kwargs=(0.5,))
    with pytest.raises(TypeError, match="expected a module or a callable"):
        penalty(Scored, real, fake, eps)
    if penalty is between:
        with pytest.raises(ValueError, match="eps: expected one number per sample"):
            penalty(critic, real, fake, eps.repeat(2))
        with pytest.raises(ValueError, match="fake: expected the shape of real"):
            penalty(critic, real, fake[:2], eps)


def test_critics_are_told_apart() -> None:
    first, second = settled(between), settled(between, mlp(WIDTH, 8, 1).double())
    for critic in (first, second, first, lambda x: first(2 * x), second):
        modules = nn.ModuleList([first, second])
        given = batch(N, WIDTH)
        with gpk.fast_double_backward():
            exact = gradients(between(critic, *given), modules)
        assert_same(gradients(between(critic, *given), modules), exact)


def test_without_the_loop_in_cpp_penalties_are_made_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = settled(between)
    monkeypatch.setattr(backends, "program", None)
    given = batch(N, WIDTH)
    assert len(functions_called(lambda: between(critic, *given))) > 20
    assert_as_new(between, critic, *given)


def test_nothing_is_kept_alive() -> None:
    critic = settled(r1)
    at = weakref.ref(critic)
    del critic
    gc.collect()
    assert at() is None
    settled(r1)  # a dead record is no obstacle


def test_a_seed_draws_the_same_numbers() -> None:
    critic = settled(drawn)
    given = batch(N, WIDTH)
    found = []
    for again in (True, False):
        torch.manual_seed(5)
        found.append([drawn(critic, *given), torch.rand(3)])
        if again:
            with gpk.fast_double_backward():
                torch.manual_seed(5)
                found.append([drawn(critic, *given), torch.rand(3)])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-11, atol=1e-11)


def test_packs_share_their_weights() -> None:
    critic = settled(drawn, pack=2)
    given = batch(N, WIDTH)
    assert_as_new(drawn, critic, *given, pack=2)
    eps = torch.rand(N // 2, dtype=torch.float64)
    assert_as_new(between, critic, *given[:2], eps, pack=2)
    with pytest.raises(ValueError, match="eps"):
        between(critic, *given, pack=2)  # one per sample
    with pytest.raises(ValueError, match="pack"):
        drawn(critic, *[x[:3] for x in given], pack=2)


def test_compiled_parts_run_eagerly() -> None:
    ran: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        ran.append(graph)
        return graph

    critic = Scored().double().eval()
    critic.body = torch.compile(critic.body, backend=backend)
    settled(between, critic)
    given = batch(N, WIDTH)
    assert_as_new(between, critic, *given)
    assert not ran
    stance = torch._dynamo.eval_frame._stance
    assert stance.stance == "default"
    critic(given[0])
    assert ran  # outside of penalties it is compiled


def test_the_compiler_is_as_it_was_after_an_error() -> None:
    class Failing(Scored):
        fails = False

        def forward(self, x: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
            if self.fails:
                raise KeyError("own")
            return super().forward(x, shift)

    critic = settled(between, Failing().double().eval())
    import torch._dynamo  # loads what has a stance

    critic.fails = True
    with pytest.raises(KeyError, match="own"):
        between(critic, *batch(N, WIDTH))
    assert torch._dynamo.eval_frame._stance.stance == "default"
    critic.fails = False
    assert_as_new(between, critic, *batch(N, WIDTH))


ANEW: dict[str, Callable[[Scored], Any]] = {
    "closure": lambda critic: lambda x: critic(x),
    "bound method": lambda critic: critic.forward,
    "partial": lambda critic: partial(critic.forward, shift=0.5),
    "partial of a closure": lambda critic: partial(lambda shift, x: critic(x, shift), 0.5),
}


@pytest.mark.parametrize("name", ANEW)
@pytest.mark.parametrize("penalty", [between, r1])
def test_critics_that_are_made_anew_are_known_again(penalty: Penalty, name: str) -> None:
    torch.manual_seed(0)
    modules = [Scored().double().eval() for _ in range(2)]
    for _ in range(6):
        for critic in modules:
            penalty(ANEW[name](critic), *batch(N, WIDTH))
    for critic in modules:
        given = batch(N, WIDTH)
        assert len(functions_called(partial(penalty, ANEW[name](critic), *given))) <= 5
        with gpk.fast_double_backward():
            exact = gradients(penalty(ANEW[name](critic), *given), critic)
        assert_same(gradients(penalty(ANEW[name](critic), *given), critic), exact)


def test_one_piece_of_code_may_be_several_critics() -> None:
    """Also such as are left to autograd after others that are not."""
    mlps = [mlp(WIDTH, 8, 1).double(), Scored().double().eval(), mlp(WIDTH, 8, 8, 1).double()]
    enclosed: list[nn.Module] = []
    for _ in range(4):
        for critic in mlps:
            enclosed[:] = [critic]
            for _ in range(3):
                given = batch(N, WIDTH)
                ours = gradients(between(lambda x: enclosed[0](x), *given), critic)
                with gpk.fast_double_backward():
                    exact = gradients(between(critic, *given), critic)
                assert_same(ours, exact)


def test_a_lambda_of_a_critic_with_batch_norm_does_not_silence_the_warning() -> None:
    critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    for _ in range(6):
        between(lambda x: critic(x), *batch(N, WIDTH))
    with pytest.warns(UserWarning, match="BatchNorm"):
        between(critic, *batch(N, WIDTH))
