"""`explain` says which way each layer takes, and leaves the critic as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gpkernels as gpk
from critics import ResidualCritic, mlp
from gpkernels import cli


def test_an_mlp_is_native_and_saves_a_third() -> None:
    told = gpk.explain(mlp(2, 64, 64, 1), torch.randn(8, 2))
    assert [call.function for call in told.calls] == ["linear", "relu", "linear", "relu", "linear"]
    assert [call.layer for call in told.calls] == ["0", "1", "2", "3", "4"]
    assert {call.way for call in told.calls} == {"rule"}
    assert told.way.startswith("native")
    forward = sum(call.flops for call in told.calls)
    assert told.eager_flops > 5.8 * forward
    assert told.flops <= 4.05 * forward
    assert "5.9" in str(told)


def test_a_residual_critic_is_recorded_layer_by_layer() -> None:
    told = gpk.explain(ResidualCritic(8, 16, "group_norm"), torch.randn(2, 3, 16, 16))
    assert told.way.startswith("recorded")
    assert {call.layer for call in told.calls} >= {"blocks.0.conv1", "blocks.3.conv2", "top"}
    assert {call.way for call in told.calls if call.function == "group_norm"} == {"rule, with curvature"}


def test_a_layer_without_a_rule_is_named_with_its_reason_and_costs_no_more_than_eager() -> None:
    critic = nn.Sequential(nn.Linear(6, 32), nn.Mish(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    told = gpk.explain(critic, torch.randn(8, 6))
    assert told.way.startswith("left to PyTorch")
    assert [call.layer for call in told.calls if call.way != "rule"] == ["1"]
    assert "mish has no rule" in told.calls[1].way
    assert told.flops <= told.eager_flops


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
def test_the_critic_and_the_random_numbers_stay_as_they_were() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    state = torch.get_rng_state()
    gpk.explain(critic, torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in critic.modules())


def test_the_shell_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "mycritic.py").write_text(
        "from torch import nn\n\n\nclass Critic(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "mycritic:Critic", "--input", "4x6"]) == 0
    page = capsys.readouterr().out
    assert "tanh" in page
    assert "with curvature" in page
    for arguments in (
        ["mycritic:Nothing", "--input", "4x6"],
        ["nowhere:Critic", "--input", "4x6"],
        ["mycritic", "--input", "4x6"],
        ["mycritic:Critic", "--input", "4xx6"],
        ["mycritic:Critic", "--input", "4x7"],
    ):
        assert cli.main(["explain", *arguments]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert len(told.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("critic", "example", "error"),
    [(3, torch.randn(2, 2), TypeError), (nn.Linear(2, 1), torch.ones(2, 2, dtype=torch.int64), TypeError)],
    ids=["a number as critic", "integers as example"],
)
def test_bad_input_is_named(critic: object, example: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"critic|example"):
        gpk.explain(critic, example)
