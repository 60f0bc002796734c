"""RMSprop against torch.optim.RMSprop followed by a clamp."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gpkernels as gpk
from gpkernels.optim import RMSprop

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wgan": {"lr": 5e-5},
    "alpha": {"alpha": 0.3, "eps": 1e-3},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "centered fast": {"centered": True, "alpha": 0.4, "eps": 1e-2},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "momentum and centered": {"momentum": 0.5, "centered": True, "eps": 1e-3},
    "everything": {"momentum": 0.9, "centered": True, "weight_decay": 0.01, "maximize": True, "eps": 1e-3},
}
CLIPS = {"unclipped": None, "clipped": 0.01}
# Where torch's kernels fuse multiply-adds, ours do too; where they do not, the last bits differ.
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """Sizes below, at and above a vector and a tile; a scalar, an empty one, and layouts that are not contiguous."""
    made = [torch.randn(size, dtype=torch.float64).to(dtype) for size in ((3, 5), (), (7,), (0, 4), (331, 107), (1, 1))]
    made.append(torch.randn(4, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last))
    made.append(torch.randn(6, 9).to(dtype).t())
    made.append(torch.randn(6, 10).to(dtype)[:, ::2])
    return [nn.Parameter(w) for w in made]


def _twins(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same numbers in the same layout, or contiguous where the layout has gaps."""
    return [nn.Parameter(w.detach().clone()) for w in weights]


def _set_grads(*lists: list[nn.Parameter], like_weights: bool = True) -> None:
    """One gradient for all twins, in the layout of the weight, as backward leaves it, or contiguous."""
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, dtype=torch.float64)
        for w in same:
            w.grad = torch.empty_like(w).copy_(grad) if like_weights else grad.to(w.dtype)


def _clamp(weights: list[nn.Parameter], clip: float | None) -> None:
    if clip is not None:
        with torch.no_grad():
            for w in weights:
                w.clamp_(-clip, clip)


def _states(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    for w in weights:
        yield from sorted(optimizer.state[w].items())


def _steps(
    count: int,
    ours: list[nn.Parameter],
    theirs: list[nn.Parameter],
    a: torch.optim.Optimizer,
    b: torch.optim.Optimizer,
    clip: float | None = None,
) -> None:
    """The same random steps by both optimisers; what the second leaves is clamped."""
    for i in range(count):
        _set_grads(ours, theirs, like_weights=i % 3 != 0)
        a.step()
        b.step()
        _clamp(theirs, clip)


def _assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter], ulps: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        tolerance = ulps * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def correctly_rounded_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's float sqrt may be off by an ulp (it can be a vector library's); IEEE's, as numpy and hardware give it."""
    monkeypatch.setattr(Tensor, "sqrt", lambda x: torch.as_tensor(np.sqrt(x.numpy())).as_subclass(Tensor))
    monkeypatch.setattr(Tensor, "sqrt_", lambda x: x.copy_(x.sqrt()))


@pytest.mark.skipif(not FUSES, reason="torch's CPU kernels do not fuse multiply-adds here")
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.usefixtures("correctly_rounded_sqrt")
def test_twenty_steps_are_torch_bit_for_bit_given_a_correct_square_root(
    dtype: torch.dtype, name: str, clip: str, backend: str
) -> None:
    ours = _weights(dtype)
    theirs = _twins(ours)
    a, b = RMSprop(ours, clip=CLIPS[clip], **OPTIONS[name]), torch.optim.RMSprop(theirs, **OPTIONS[name])
    _steps(20, ours, theirs, a, b, CLIPS[clip])
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    for (key, x), (other, y) in zip(_states(a, ours), _states(b, theirs), strict=True):
        assert key == other
        assert torch.equal(x, y), key


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_twenty_steps_agree_with_torch_as_it_is(dtype: torch.dtype, name: str, clip: str, backend: str) -> None:
    ours = _weights(dtype)
    theirs = _twins(ours)
    a, b = RMSprop(ours, clip=CLIPS[clip], **OPTIONS[name]), torch.optim.RMSprop(theirs, **OPTIONS[name])
    _steps(20, ours, theirs, a, b, CLIPS[clip])
    _assert_same(ours, theirs, 64)
    assert [key for key, _ in _states(a, ours)] == [key for key, _ in _states(b, theirs)]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_no_worse_than_twice_torch(dtype: torch.dtype, name: str, backend: str) -> None:
    ours = _weights(dtype)
    theirs, exact = _twins(ours), [nn.Parameter(w.detach().double()) for w in ours]
    options = {"eps": 1e-3, **OPTIONS[name]}  # 1e-8 is zero in float16: torch divides by it
    optimizers = RMSprop(ours, **options), torch.optim.RMSprop(theirs, **options), torch.optim.RMSprop(exact, **options)
    for _ in range(20):
        _set_grads(ours, theirs, exact)
        for e, w in zip(exact, ours, strict=True):
            e.grad = w.grad.double()
        for optimizer in optimizers:
            optimizer.step()

    def error(weights: list[nn.Parameter]) -> float:
        gaps = [(w.detach().double() - e.detach()).flatten() for w, e in zip(weights, exact, strict=True)]
        return float(torch.cat(gaps).norm())

    assert all(torch.isfinite(w).all() for w in ours)
    # Where torch's rounded variance falls below zero it gives NaN; then finite numbers are all one can ask for.
    assert math.isnan(error(theirs)) or error(ours) <= 2 * error(theirs)


def test_a_parameter_of_each_dtype_in_one_group(backend: str) -> None:
    ours = [nn.Parameter(torch.randn(5, 3, dtype=torch.float64).to(t)) for t in (torch.float64, torch.float32)]
    theirs = _twins(ours)
    _steps(5, ours, theirs, RMSprop(ours), torch.optim.RMSprop(theirs))
    _assert_same(ours, theirs, 64)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_moves_to_torch_and_back_in_mid_run(name: str, backend: str) -> None:
    """Three runs of five steps by torch, ours and torch, compared with torch alone and with each optimiser's reload."""
    options = OPTIONS[name]
    ours = _weights(torch.float64)
    theirs = _twins(ours)
    relay: torch.optim.Optimizer = torch.optim.RMSprop(ours, **options)
    whole = torch.optim.RMSprop(theirs, **options)
    for leg in (torch.optim.RMSprop, RMSprop, torch.optim.RMSprop, RMSprop):
        successor = leg(ours, lr=123.0)  # every option comes with the state
        successor.load_state_dict(copy.deepcopy(relay.state_dict()))
        relay = successor
        _steps(5, ours, theirs, relay, whole)
    _assert_same(ours, theirs, 256)
    for (key, x), (other, y) in zip(_states(relay, ours), _states(whole, theirs), strict=True):
        assert key == other
        torch.testing.assert_close(x, y, msg=key)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_reloaded_run_continues_with_identical_numbers(name: str, backend: str) -> None:
    ours = _weights(torch.float32)
    first = RMSprop(ours, clip=0.5, **OPTIONS[name])
    for _ in range(3):
        _set_grads(ours)
        first.step()
    twins = _twins(ours)
    second = RMSprop(twins)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["clip"] == 0.5
    for _ in range(3):
        _set_grads(ours, twins)
        first.step()
        second.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, twins, strict=True))


def test_a_state_dict_of_torch_keeps_the_clip_that_was_asked_for(backend: str) -> None:
    w = nn.Parameter(torch.full((3,), 5.0))
    plain = torch.optim.RMSprop([w], lr=1e-3)
    w.grad = torch.ones(3)
    plain.step()
    optimizer = RMSprop([w], clip=0.25)
    optimizer.load_state_dict(plain.state_dict())
    optimizer.step()
    assert w.tolist() == [0.25] * 3


def test_each_group_has_its_own_clip(backend: str) -> None:
    a, b, c, d = (nn.Parameter(torch.full((3,), 5.0)) for _ in range(4))
    optimizer = RMSprop([{"params": [a], "clip": 0.1}, {"params": [b]}, {"params": [c], "clip": None}], clip=0.2)
    optimizer.add_param_group({"params": [d], "clip": 0.3, "lr": 1.0})
    for w in (a, b, c, d):
        w.grad = -torch.ones(3)
    optimizer.step()
    assert [a.max().item(), b.max().item(), d.max().item()] == pytest.approx([0.1, 0.2, 0.3])
    assert c.min() > 4


def test_parameters_without_gradient_are_left_alone(backend: str) -> None:
    idle, busy = nn.Parameter(torch.full((3,), 5.0)), nn.Parameter(torch.full((3,), 5.0))
    busy.grad = torch.ones(3)
    optimizer = RMSprop([idle, busy], clip=0.1)
    optimizer.step()
    assert idle.tolist() == [5.0] * 3
    assert busy.max() <= 0.1
    assert idle not in optimizer.state


def test_the_closure_runs_with_gradients_and_its_loss_comes_back(backend: str) -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([w], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (w < 1).all()


def test_a_learning_rate_schedule_is_followed(backend: str) -> None:
    ours = _weights(torch.float64)
    theirs = _twins(ours)
    a, b = RMSprop(ours, lr=0.1), torch.optim.RMSprop(theirs, lr=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (a, b)]
    for _ in range(4):
        _steps(1, ours, theirs, a, b)
        for schedule in schedules:
            schedule.step()
    _assert_same(ours, theirs, 64)


def _step_with(weight: nn.Parameter, grad: Tensor | None = None, **changes: Any) -> None:
    optimizer = RMSprop([weight])
    optimizer.param_groups[0].update(changes)
    weight.grad = torch.ones_like(weight) if grad is None else grad
    optimizer.step()


def _one() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


BAD = {
    "a negative clip": (lambda: RMSprop([_one()], clip=-0.1), ValueError, r"clip.*-0\.1"),
    "an infinite clip": (lambda: RMSprop([_one()], clip=float("inf")), ValueError, "clip.*inf"),
    "a text clip": (lambda: RMSprop([_one()], clip="0.1"), TypeError, "clip.*str"),
    "a negative clip in a group": (lambda: RMSprop([{"params": [_one()], "clip": -1}]), ValueError, "clip.*-1"),
    "a negative clip in a later group": (
        lambda: RMSprop([_one()]).add_param_group({"params": [_one()], "clip": -1}),
        ValueError,
        "clip.*-1",
    ),
    "a tensor learning rate": (lambda: RMSprop([_one()], lr=torch.tensor(0.1)), TypeError, "lr.*tensor"),
    "a negative learning rate": (lambda: RMSprop([_one()], lr=-1.0), ValueError, "learning rate.*-1"),
    "alpha above one": (lambda: RMSprop([_one()], alpha=1.5), ValueError, r"alpha.*1\.5"),
    "a bool learning rate": (lambda: RMSprop([_one()], lr=True), TypeError, "lr.*bool"),
    "a text alpha": (lambda: RMSprop([_one()], alpha="x"), TypeError, "alpha.*str"),
    "an infinite momentum": (lambda: RMSprop([_one()], momentum=math.inf), ValueError, "momentum.*inf"),
    "a NaN eps": (lambda: RMSprop([_one()], eps=math.nan), ValueError, "eps.*nan"),
    "a NaN learning rate in a group": (lambda: RMSprop([{"params": [_one()], "lr": math.nan}]), ValueError, "lr.*nan"),
    "no parameters": (lambda: RMSprop([]), ValueError, "empty"),
    "a sparse gradient": (lambda: _step_with(_one(), torch.ones(3).to_sparse()), TypeError, "grad.*sparse"),
    "complex parameters": (lambda: _step_with(nn.Parameter(torch.ones(3) * 1j)), TypeError, "params.*complex"),
    "capturable": (lambda: RMSprop([_one()], capturable=True), ValueError, "capturable.*torch.optim.RMSprop"),
    "differentiable": (lambda: RMSprop([_one()], differentiable=True), ValueError, "differentiable.*True"),
    "a text foreach": (lambda: RMSprop([_one()], foreach="yes"), TypeError, "foreach.*'yes'"),
    "a text side": (lambda: RMSprop([_one()], maximize="no"), TypeError, "maximize: expected True or False, got 'no'"),
    "a NaN centring": (lambda: RMSprop([_one()], centered=math.nan), TypeError, "centered.*nan"),
    "a capturable state": (lambda: _step_with(_one(), capturable=True), ValueError, "capturable"),
    "a differentiable state": (lambda: _step_with(_one(), differentiable=True), ValueError, "differentiable"),
}


def test_the_signature_is_torchs_and_a_clip() -> None:
    ours, theirs = (list(inspect.signature(made).parameters.values()) for made in (RMSprop, torch.optim.RMSprop))
    assert [(p.name, p.default, p.kind) for p in ours[:-1]] == [(p.name, p.default, p.kind) for p in theirs]
    assert ours[-1].name == "clip"
    group = RMSprop([_one()], 0.1, 0.9, 1e-6, 0.2, 0.3, True, False, True, True).param_groups[0]
    assert (group["centered"], group["foreach"], group["maximize"]) == (True, True, True)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, backend: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_capturable_that_came_with_a_state_dict_is_refused(backend: str) -> None:
    donor = torch.optim.RMSprop([_one()])
    loaded = donor.state_dict()
    loaded["param_groups"][0]["capturable"] = True
    w = _one()
    optimizer = RMSprop([w])
    optimizer.load_state_dict(loaded)
    w.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"capturable.*RMSprop"):
        optimizer.step()


def test_nothing_moves_when_a_later_gradient_is_bad(backend: str) -> None:
    for groups in (False, True):
        good, bad = _one(), _one()
        optimizer = RMSprop([{"params": [good]}, {"params": [bad]}] if groups else [good, bad])
        good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
        with pytest.raises(TypeError):
            optimizer.step()
        assert good.tolist() == [1.0] * 3
        assert not optimizer.state


def _snapshot(optimizer: RMSprop) -> tuple[Any, ...]:
    """Copy everything that a step or a group could change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {
        i: {k: v.clone() for k, v in optimizer.state[p].items()} for i, p in enumerate(params) if p in optimizer.state
    }
    versions = [p._version for p in params]
    return [p.detach().clone() for p in params], versions, options, state, len(optimizer.state)


def _assert_unchanged(optimizer: RMSprop, before: tuple[Any, ...]) -> None:
    for now, then in zip(tree_leaves(_snapshot(optimizer)), tree_leaves(before), strict=True):
        if isinstance(then, Tensor):
            torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
        else:
            assert now == then or now is then  # a NaN is itself


FOREIGN: dict[str, tuple[Callable[[RMSprop, nn.Parameter], Any], type[Exception], str]] = {
    "a sparse gradient": (lambda o, w: setattr(w, "grad", torch.ones(3).to_sparse()), TypeError, "grad.*sparse"),
    "a dtype that changed": (lambda o, w: _become(w, w.data.double()), ValueError, "square_avg.*float64.*float32"),
    "a shape that changed": (lambda o, w: _become(w, torch.ones(4)), ValueError, r"square_avg.*\(?\[?4.*3"),
    "integers": (lambda o, w: _become(w, torch.ones(3, dtype=torch.int64)), TypeError, "params.*int64"),
    "a parameter that overlaps itself": (lambda o, w: _become(w, torch.ones(1).expand(3)), RuntimeError, "overlap"),
    "state that overlaps itself": (
        lambda o, w: o.state[w].update(square_avg=torch.ones(1).expand(3)),
        RuntimeError,
        "square_avg.*overlap",
    ),
    "state of another shape": (
        lambda o, w: o.state[w].update(square_avg=torch.ones(4)),
        ValueError,
        "square_avg.*shape",
    ),
    "state on another device": (
        lambda o, w: o.state[w].update(square_avg=torch.ones(3, device="meta")),
        ValueError,
        "square_avg.*device.*cpu.*meta",
    ),
    "a count that is no tensor": (lambda o, w: o.state[w].update(step=1), TypeError, "step.*int"),
}
OPTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "capturable": ({"capturable": True}, ValueError, "capturable"),
    "differentiable": ({"differentiable": True}, ValueError, "differentiable"),
    "a NaN learning rate": ({"lr": math.nan}, ValueError, "lr.*nan"),
    "a NaN learning rate in a tensor": ({"lr": torch.tensor(math.nan)}, ValueError, "lr.*nan"),
    "an infinite learning rate": ({"lr": math.inf}, ValueError, "lr.*inf"),
    "a negative learning rate": ({"lr": -1.0}, ValueError, "lr.*-1"),
    "a text learning rate": ({"lr": "1"}, TypeError, "lr.*str"),
    "a bool learning rate": ({"lr": True}, TypeError, "lr.*bool"),
    "alpha above one": ({"alpha": 1.5}, ValueError, r"alpha.*1\.5"),
    "a NaN alpha": ({"alpha": math.nan}, ValueError, "alpha.*nan"),
    "a NaN eps": ({"eps": math.nan}, ValueError, "eps.*nan"),
    "a NaN decay": ({"weight_decay": math.nan}, ValueError, "weight_decay.*nan"),
    "a NaN momentum": ({"momentum": math.nan}, ValueError, "momentum.*nan"),
    "a negative momentum": ({"momentum": -0.5}, ValueError, r"momentum.*-0\.5"),
    "a NaN clip": ({"clip": math.nan}, ValueError, "clip.*nan"),
    "a negative clip": ({"clip": -1}, ValueError, "clip.*-1"),
    "a bool clip": ({"clip": True}, TypeError, "clip.*bool"),
}


def _become(weight: nn.Parameter, data: Tensor) -> None:
    """Replace the weight's data, as ``module.to`` does, with a matching gradient."""
    weight.grad = None
    weight.requires_grad_(data.is_floating_point())
    weight.data = data
    weight.grad = torch.ones_like(data)


def _two(groups: bool, steps: int = 2) -> tuple[RMSprop, nn.Parameter]:
    """An optimiser that has stepped, and the last of its weights; their gradients are ones."""
    first, last = _one(), _one()
    first.grad, last.grad = torch.ones(3), torch.ones(3)
    optimizer = RMSprop([{"params": [first]}, {"params": [last]}] if groups else [first, last], lr=0.1, clip=0.5)
    for _ in range(steps):
        optimizer.step()
    return optimizer, last


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_refused_step_changes_nothing(name: str, groups: bool, backend: str) -> None:
    change, error, message = FOREIGN[name]
    optimizer, last = _two(groups)
    change(optimizer, last)
    before = _snapshot(optimizer) if name != "a count that is no tensor" else None
    with pytest.raises(error, match=message):
        optimizer.step()
    if before is not None:
        _assert_unchanged(optimizer, before)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 2


@pytest.mark.parametrize("name", OPTION)
def test_a_step_with_a_refused_option_changes_nothing(name: str, backend: str) -> None:
    options, error, message = OPTION[name]
    optimizer, _ = _two(groups=True)
    optimizer.param_groups[1].update(options)
    before = _snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    _assert_unchanged(optimizer, before)


@pytest.mark.parametrize("name", OPTION)
def test_a_refused_group_is_not_kept(name: str, backend: str) -> None:
    options, error, message = OPTION[name]
    optimizer, _ = _two(groups=False)
    before = _snapshot(optimizer)
    with pytest.raises(TypeError if isinstance(options.get("lr"), Tensor) else error, match=message.partition(".")[0]):
        optimizer.add_param_group({"params": [_one()], **options})
    assert len(optimizer.param_groups) == 1
    _assert_unchanged(optimizer, before)
    optimizer.step()  # and goes on


def test_a_group_that_torch_refuses_is_not_kept(backend: str) -> None:
    optimizer, last = _two(groups=False)
    before = _snapshot(optimizer)
    for group, error in (({"params": [last]}, ValueError), ({"params": [3.0]}, TypeError), (3, TypeError)):
        with pytest.raises(error):
            optimizer.add_param_group(group)
    _assert_unchanged(optimizer, before)


def test_a_step_that_a_forced_backend_cannot_take_changes_nothing() -> None:
    first, last = _one(), nn.Parameter(torch.ones(3, device="meta"))
    first.grad, last.grad = torch.ones(3), torch.ones(3, device="meta")
    optimizer = RMSprop([first, last])
    with gpk.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced"):
        optimizer.step()
    assert first.tolist() == [1.0] * 3
    assert not optimizer.state


def test_a_closure_that_raises_changes_nothing(backend: str) -> None:
    optimizer, _ = _two(groups=False)
    before = _snapshot(optimizer)

    def closure() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(closure)
    _assert_unchanged(optimizer, before)


def test_what_a_closure_changes_is_checked(backend: str) -> None:
    optimizer, last = _two(groups=True)

    def closure() -> None:
        last.grad = torch.ones(3).to_sparse()

    with pytest.raises(TypeError, match=r"grad.*sparse"):
        optimizer.step(closure)
    assert all(own["step"] == 2 for own in optimizer.state.values())


def test_a_state_dict_of_torch_keeps_the_clip_of_each_group(backend: str) -> None:
    a, b, c = (_one() for _ in range(3))
    optimizer = RMSprop([{"params": [a], "clip": 0.25}, {"params": [b], "clip": None}, {"params": [c]}], clip=0.5)
    optimizer.load_state_dict(torch.optim.RMSprop([{"params": [w]} for w in (a, b, c)]).state_dict())
    assert [group["clip"] for group in optimizer.param_groups] == [0.25, None, 0.5]


def test_copies_keep_the_clip_of_each_group() -> None:
    optimizer = RMSprop([{"params": [_one()], "clip": 0.25}, {"params": [_one()]}], clip=0.5)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [group["clip"] for group in twin.param_groups] == [0.25, 0.5]
        assert twin.defaults["clip"] == 0.5


def test_state_that_a_changed_dtype_left_behind_can_be_brought_along(backend: str) -> None:
    optimizer, last = _two(groups=False)
    for w in optimizer.param_groups[0]["params"]:
        _become(w, w.data.double())
    with pytest.raises(ValueError, match=r"load_state_dict\(state_dict\(\)\)"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[last]["step"] == 3


@pytest.mark.parametrize("keys", [{"foreach": True}, {"foreach": False}, {"maximize": 1}], ids=str)
def test_keys_of_torch_that_change_no_number_are_taken(keys: dict[str, Any], backend: str) -> None:
    ours, theirs = _one(), _one()
    a, b = RMSprop([ours]), torch.optim.RMSprop([theirs])
    for optimizer, w in ((a, ours), (b, theirs)):
        optimizer.param_groups[0].update(keys)
        w.grad = torch.full((3,), 0.5)
        optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_learning_rate_of_numpy_or_in_a_tensor_of_torchs_state_is_taken(backend: str) -> None:
    steps = []
    for lr in (0.5, np.float32(0.5), torch.tensor(0.5)):
        w = _one()
        _step_with(w, lr=lr)
        steps.append(w.detach())
    assert all(torch.equal(w, steps[0]) for w in steps)


@pytest.mark.parametrize("change", ["step", "clip_weights_"])
def test_a_graph_that_saved_the_weight_notices_the_change(change: str, backend: str) -> None:
    w = _one()
    before = w._version
    y = (w * w).sum()
    if change == "step":
        _step_with(w)
    else:
        gpk.clip_weights_(w, 0.5)
    assert w._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_state_counts_its_changes_too(backend: str) -> None:
    w = _one()
    optimizer = RMSprop([w], momentum=0.9, centered=True)
    w.grad = torch.ones(3)
    optimizer.step()
    before = {name: t._version for name, t in optimizer.state[w].items()}
    optimizer.step()
    assert all(t._version > before[name] for name, t in optimizer.state[w].items())
