"""`gpkernels explain --approximate`: bias, spread and cost of the approximate R1 penalty are what they have to be."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from critics import mlp
from gpkernels import cli
from gpkernels.bench import approximate
from gpkernels.bench.approximate import AUTOCAST, PRECISIONS, Comparison, Errors, Row, compare

SECONDS = 1e-3  # of timing, which nothing here depends on


def rows(found: Comparison, precision: str) -> dict[float | None, Row]:
    return {row.sigma: row for row in found.rows if row.precision == precision}


@pytest.fixture(scope="module")
def linear() -> Comparison:
    torch.manual_seed(0)
    return compare(nn.Linear(5, 1), torch.randn(32, 5), (1e-3, 0.1), 60, SECONDS)


def test_a_linear_critic_has_no_bias_and_the_spread_of_a_chi_square(linear: Comparison) -> None:
    for sigma in (1e-3, 0.1):
        row = rows(linear, "float32")[sigma]
        for errors in (row.value, row.gradients):
            assert abs(errors.bias) < 1e-3  # rounding
            assert errors.spread > 0.1
        # One draw of 32 samples has the relative variance 2 / 32, up to what 60 draws tell of it.
        assert row.value.spread == pytest.approx(math.sqrt(2 / 32), rel=0.4)


def test_the_bias_is_that_of_the_draws_themselves() -> None:
    """Without the linear estimates beside them the same draws have the same mean, within their spread."""
    torch.manual_seed(0)
    critic, real = mlp(3, 16, 1, activation=nn.Tanh), torch.randn(64, 3)
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(3)
    draws = 200
    row = rows(compare(critic, real, (1.0,), draws, SECONDS), "float32")[1.0]
    exact = gpk.r1_penalty(critic.double(), real.double()).item()
    generators = (torch.Generator().manual_seed(seed) for seed in range(draws))
    values = torch.stack(
        [gpk.approximate_r1_penalty(critic.float(), real, 1.0, generator=g).detach() for g in generators]
    )
    values = values.double() / exact
    assert row.value.bias == pytest.approx(values.mean().item() - 1, abs=3 * values.std().item() / math.sqrt(draws))
    assert row.value.spread == pytest.approx(values.std().item(), rel=1e-3)
    assert abs(row.value.bias) > 5 * row.value.uncertainty  # so large a sigma is felt


def test_a_small_bias_is_told_where_a_draw_spreads_wide(linear: Comparison) -> None:
    assert rows(linear, "float32")[0.1].value.uncertainty < 1e-4 < linear.rows[1].value.spread / math.sqrt(60)


def test_low_precision_needs_a_larger_sigma() -> None:
    torch.manual_seed(0)
    found = compare(mlp(5, 32, 32, 1, activation=nn.Tanh), torch.randn(16, 5), (1e-3, 0.1), 20, SECONDS)
    for precision in ("bfloat16", AUTOCAST):
        small, large = (rows(found, precision)[sigma] for sigma in (1e-3, 0.1))
        precise = rows(found, "float32")[1e-3]
        assert small.value.bias > 10 * abs(precise.value.bias)
        assert small.value.bias > 10 * abs(large.value.bias)
        assert small.gradients.bias > 10 * precise.gradients.bias
    assert 1e-5 < rows(found, "bfloat16")[None].gradients.bias < 0.1


def test_costs_are_counted(linear: Comparison) -> None:
    torch.manual_seed(0)
    found = compare(mlp(64, 64, 64, 1), torch.randn(16, 64), (0.1,), 2, SECONDS)
    one = 2 * 16 * (64 * 64 * 2 + 64)
    flops = {name: cost.flops / one for name, cost in found.costs.items()}
    assert flops[approximate.OURS] == pytest.approx(4, rel=0.02)
    # Two calls, for each a product forth, one for the weights and, but in the first layer, one back.
    assert flops[approximate.APPROXIMATE] == pytest.approx(2 * (3 - 4096 / 8256), rel=0.02)
    assert all(cost.cpu > 0 for cost in found.costs.values())


class Fused(nn.Module):
    """PyTorch's fused attention, with dropout, which would count as noise."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.top = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x).mean(1)
        return self.top(x), x


def test_fused_attention_is_measured_and_the_critic_left_alone() -> None:
    torch.manual_seed(0)
    critic, real = Fused(), torch.randn(4, 3, 8)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    found = compare(critic, real, (0.1,), 3, SECONDS)
    assert [row.sigma for row in found.rows] == [None, 0.1] * len(PRECISIONS)
    assert rows(found, "float32")[0.1].value.bias < 0.1
    assert critic.training
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in critic.parameters())


def test_the_same_numbers_come_again() -> None:
    torch.manual_seed(0)
    critic, real = mlp(3, 8, 1), torch.randn(4, 3)
    first, second = (compare(critic, real, (0.1,), 3, SECONDS).rows for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("critic", "real", "draws", "error", "said"),
    [
        (lambda x: x, torch.randn(2, 2), 3, TypeError, "critic: expected a torch.nn.Module"),
        (nn.Linear(2, 1), [1.0], 3, TypeError, "real: expected a tensor"),
        (nn.Linear(2, 1), torch.randn(2, 2), 1, ValueError, "draws: expected at least 2"),
        (nn.ReLU(), torch.randn(2, 2), 3, ValueError, "critic: expected weights that are trained"),
    ],
    ids=["critic", "real", "draws", "weights"],
)
def test_bad_input_is_named(critic: nn.Module, real: Tensor, draws: int, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        compare(critic, real, (0.1,), draws, SECONDS)


def test_a_critic_without_a_gradient_is_refused() -> None:
    critic = nn.Linear(2, 1)
    nn.init.zeros_(critic.weight)
    with pytest.raises(ValueError, match="expected scores with a gradient"):
        compare(critic, torch.randn(2, 2), (0.1,), 2, SECONDS)


FLAT = Errors(0.1, 0.01, 0.5)
FOUND = Comparison(
    2.0,
    4,
    3,
    [Row(p, sigma, FLAT, FLAT) for p in PRECISIONS for sigma in (None, 0.01, 0.1)],
    {"r1_penalty": approximate.Cost(2_000_000, 31.0)},
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the command line measures, without measuring it."""
    asked: list[tuple] = []

    def instead(critic: nn.Module, real: Tensor, sigmas: tuple[float, ...], draws: int) -> Comparison:
        asked.append((type(critic), tuple(real.shape), sigmas, draws))
        return FOUND

    monkeypatch.setattr(approximate, "compare", instead)
    return asked


NAMED = ["explain", "gpkernels.zoo:ResidualCritic", "--input", "2x3x32x32"]


def test_the_shell_prints_writes_and_draws(measured: list[tuple], tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "found.json", tmp_path / "found.svg"
    more = ["--approximate", "--sigmas", "0.01,1e-1", "--draws", "3", "--json", str(table), "--plot", str(picture)]
    assert cli.main([*NAMED, *more]) == 0
    ((kind, shape, sigmas, draws),) = measured
    assert (kind.__name__, shape, sigmas, draws) == ("ResidualCritic", (2, 3, 32, 32), (0.01, 0.1), 3)
    page = capsys.readouterr().out
    for said in ("the exact 2: 4 samples, 3 draws", "bfloat16 autocast", "exact    +1.0e-01", "r1_penalty", "2.000"):
        assert said in page
    written = json.loads(table.read_text())
    assert written["rows"][0] == {
        **{"precision": "float32", "sigma": None},
        **{kind: {"bias": 0.1, "uncertainty": 0.01, "spread": 0.5} for kind in ("value", "gradients")},
    }
    assert written["costs"]["r1_penalty"] == {"flops": 2_000_000, "cpu": 31.0}
    assert "ResidualCritic" in picture.read_text()


def test_the_shell_has_defaults(measured: list[tuple]) -> None:
    assert cli.main([*NAMED, "--approximate"]) == 0
    assert measured[0][2:] == (approximate.SIGMAS, approximate.DRAWS)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sigmas", "0.1"], "--sigmas: expected with --approximate"),
        (["--plot", "a.svg"], "--plot: expected with --approximate"),
        (["--approximate", "--sigmas", "0.1,0"], "--sigmas: expected numbers above 0, such as 0.01,0.1, got '0'"),
        (["--approximate", "--sigmas", "a"], "--sigmas: expected numbers above 0"),
        (["--approximate", "--json", "/dev/null/all.json"], "--json /dev/null/all.json: Not a dir"),
        (["--approximate", "--plot", "found.foo"], "--plot found.foo: Format 'foo' is not supported"),
    ],
    ids=["sigmas alone", "plot alone", "a sigma of 0", "letters", "no such folder", "no such format"],
)
def test_a_mistake_is_one_line_and_two(more: list[str], said: str, measured: list[tuple], capsys) -> None:
    assert cli.main([*NAMED, *more]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert said in complaint


def test_a_missing_matplotlib_is_named_before_anything_is_measured(
    measured: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main([*NAMED, "--approximate", "--plot", "found.svg"]) == 2
    assert "--plot: needs matplotlib; install it with: pip install 'gpkernels[bench]'" in capsys.readouterr().err
    assert not measured
