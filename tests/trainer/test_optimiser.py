"""The trainer's Adam is torch's, to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import profile

from gptrainer.optimiser import Adam

BETAS = (0.5, 0.9)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))


def beside_torchs() -> tuple[nn.Module, Adam, nn.Module, torch.optim.Adam]:
    mine = network()
    theirs = copy.deepcopy(mine)
    return (
        mine,
        Adam(mine.parameters(), 1e-2, BETAS),
        theirs,
        torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=BETAS, fused=True),
    )


def step(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, *, without: int | None = None) -> None:
    optimiser.zero_grad()
    model(x).square().mean().backward()
    if without is not None:
        list(model.parameters())[without].grad = None
    optimiser.step()


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    for ours, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_updates_and_states_are_torchs() -> None:
    mine, ours, theirs, other = beside_torchs()
    for lr in (1e-2, 1e-2, 3e-3, 0.0, 1e-2):
        x = torch.randn(7, 3)
        for model, optimiser in ((mine, ours), (theirs, other)):
            optimiser.param_groups[0]["lr"] = lr
            step(model, optimiser, x)
        assert_same(mine, theirs)
    state, expected = ours.state_dict(), other.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        for name, value in values.items():
            assert torch.equal(state["state"][index][name], value)


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    mine, ours, theirs, other = beside_torchs()
    for without in (0, None, None, 2, None):
        x = torch.randn(7, 3)
        step(mine, ours, x, without=without)
        step(theirs, other, x, without=without)
        assert_same(mine, theirs)
    ours.zero_grad()
    ours.step()
    assert_same(mine, theirs)


def test_it_goes_on_from_a_loaded_state() -> None:
    mine, ours, theirs, other = beside_torchs()
    for _ in range(3):
        x = torch.randn(7, 3)
        step(mine, ours, x)
        step(theirs, other, x)
    again = copy.deepcopy(mine)
    loaded = Adam(again.parameters(), 1.0, BETAS)
    step(again, loaded, torch.randn(7, 3))  # so that there are lists of what is about to be replaced
    again.load_state_dict(mine.state_dict())
    loaded.load_state_dict(copy.deepcopy(other.state_dict()))  # torch would share its tensors
    for _ in range(2):
        x = torch.randn(7, 3)
        step(again, loaded, x)
        step(theirs, other, x)
        assert_same(again, theirs)


def test_a_second_group_has_its_own_rate() -> None:
    mine, ours, theirs, other = beside_torchs()
    more = nn.Parameter(torch.randn(4)), nn.Parameter(torch.zeros(4))
    more[1].data.copy_(more[0])
    for optimiser, p in zip((ours, other), more, strict=True):
        optimiser.add_param_group({"params": [p], "lr": 0.5})
    for _ in range(3):
        for model, optimiser, p in ((mine, ours, more[0]), (theirs, other, more[1])):
            optimiser.zero_grad()
            (model(torch.ones(2, 3)).sum() + p.square().sum()).backward()
            optimiser.step()
    assert_same(mine, theirs)
    assert torch.equal(*more)


def test_hooks_on_all_optimisers_run_once_a_step() -> None:
    mine, ours, _, _ = beside_torchs()
    seen: list[str] = []
    handles = (
        register_optimizer_step_pre_hook(lambda *args: seen.append("before")),
        register_optimizer_step_post_hook(lambda *args: seen.append("after")),
    )
    try:
        step(mine, ours, torch.ones(2, 3))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"]
    step(mine, ours, torch.ones(2, 3))
    assert seen == ["before", "after"]


def test_a_hook_may_change_the_arguments() -> None:
    _, ours, _, _ = beside_torchs()
    ours.register_step_pre_hook(lambda optimiser, args, kwargs: ((args[0], lambda: "of the hook"), {}))
    assert ours.step(lambda: "given") == "of the hook"


def test_the_profiler_sees_steps() -> None:
    mine, ours, _, _ = beside_torchs()
    with profile() as seen:
        step(mine, ours, torch.ones(2, 3))
    assert [event.name for event in seen.events()].count("Optimizer.step#Adam.step") == 1


def test_a_scheduler_sets_the_rate() -> None:
    mine, ours, _, _ = beside_torchs()
    schedule = torch.optim.lr_scheduler.ExponentialLR(ours, 0.5)
    step(mine, ours, torch.ones(2, 3))
    schedule.step()
    assert ours.param_groups[0]["lr"] == 5e-3


def test_hooks_run_once_a_step_and_a_closure_is_called() -> None:
    mine, ours, _, _ = beside_torchs()
    seen: list[str] = []
    ours.register_step_pre_hook(lambda *args: seen.append("before"))
    ours.register_step_post_hook(lambda *args: seen.append("after"))

    def closure() -> Tensor:
        ours.zero_grad()
        loss: Tensor = mine(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    before = [p.clone() for p in mine.parameters()]
    assert torch.is_tensor(ours.step(closure))
    assert seen == ["before", "after"]
    assert not all(torch.equal(p, q) for p, q in zip(before, mine.parameters(), strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_forgotten_or_zeroed(set_to_none: bool) -> None:
    mine, ours, _, _ = beside_torchs()
    mine(torch.ones(2, 3)).sum().backward()
    ours.zero_grad(set_to_none=set_to_none)
    for p in mine.parameters():
        assert (p.grad is None) if set_to_none else (p.grad is not None and not p.grad.any())
