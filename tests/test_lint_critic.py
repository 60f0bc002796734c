"""Each mistake of a critic is found by calling it, and a critic that is right is left in peace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from critics import Featured, ResidualCritic, dcgan, mlp
from gpkernels import cli
from gpkernels.bench.small import SMALL
from gpkernels.verify.critics import ZOO
from gpkernels.verify.lint_critic import Finding, lint_critic


class Calls(nn.Module):
    """A critic from a function of itself and a batch; its net has 6 inputs."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], net: nn.Module | None = None) -> None:
        super().__init__()
        self.how, self.net = how, net or mlp(6, 16, 1, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def mistakes(critic: Callable[..., Any], example: Tensor | None = None) -> list[str]:
    return [f.mistake for f in lint_critic(critic, torch.randn(8, 6) if example is None else example)]


def only(critic: Callable[..., Any], example: Tensor | None = None) -> Finding:
    (finding,) = lint_critic(critic, torch.randn(8, 6) if example is None else example)
    return finding


# --- those that are right ---------------------------------------------------------------------------------------------

MIXING = ("DCGAN BatchNorm, N 2", "StyleGAN2, N 4", "AMP batch spread, N 16")


@pytest.mark.parametrize("name", ZOO)
def test_a_right_critic_has_no_mistake(name: str) -> None:
    make, shape = ZOO[name]
    assert mistakes(make(), torch.randn(8, *shape)) == []


@pytest.mark.parametrize("name", SMALL)
def test_small_critics_have_the_mistakes_that_they_are_known_for(name: str) -> None:
    case = SMALL[name]
    found = mistakes(case.make(), torch.randn(case.shape))
    assert found == (["samples meet"] if name in MIXING else [])


ODD: dict[str, Callable[[], Callable[..., Any]]] = {
    "ReLU": lambda: mlp(6, 16, 1),
    "a function": lambda: lambda x: x.square().sum(1),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1)),
    "BatchNorm in eval mode": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).eval(),
    "a map of scores": lambda: nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4))),
    "scores far from zero": lambda: Calls(lambda s, x: s.net(x) + 1e4),
    "a small gradient": lambda: Calls(lambda s, x: 1e-9 * s.net(x) + 1),
    "half of the input unused": lambda: Calls(lambda s, x: s.net(x * torch.arange(6).lt(3))),
    "a float32 constant": lambda: Calls(lambda s, x: s.net(x @ torch.eye(6))),
    "times zero": lambda: Calls(lambda s, x: s.net(x) * 0),
}


@pytest.mark.parametrize("name", ODD)
def test_what_looks_odd_and_is_right_is_no_mistake(name: str) -> None:
    assert mistakes(ODD[name]()) == []


def test_features_and_images_are_taken() -> None:
    assert mistakes(Featured().eval()) == []
    assert mistakes(dcgan(3, 4, 8), torch.randn(4, 3, 8, 8)) == []
    assert mistakes(mlp(6, 8, 1), torch.randn(1, 6)) == []


# --- the gradient is cut ----------------------------------------------------------------------------------------------


def normalised_outside(s: Calls, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = x / x.norm(dim=1, keepdim=True)
    return s.net(x)


def norm_outside(s: Calls, x: Tensor) -> Tensor:
    """The usual one: a normaliser whose statistics are left out of the graph."""
    return s.net(x / x.detach().norm(dim=1, keepdim=True))


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * x  # without its 2


def test_scores_without_a_way_to_the_input_are_told_from_those_that_do_not_depend_on_it() -> None:
    found = only(Calls(normalised_outside))
    assert found.mistake == "no gradient"
    assert "the scores change with the input, but autograd has no graph between them" in found.text
    found = only(Calls(lambda s, x: s.net.weight.sum().expand(len(x)), nn.Linear(6, 1)))
    assert found.mistake == "no gradient"
    assert found.text == "the scores do not depend on the input"
    assert only(lambda x: torch.from_numpy(x.detach().numpy()).square().sum(1)).mistake == "no gradient"


CUT: dict[str, Callable[[], Callable[..., Any]]] = {
    "a norm outside": lambda: Calls(norm_outside),
    "a part of the scores": lambda: Calls(lambda s, x: s.net(x) + 0.2 * s.net(x.detach())),
    "a wrong backward": lambda: Calls(lambda s, x: s.net(Wrong.apply(x))),
    "straight through": lambda: Calls(lambda s, x: s.net(x + (x.round() - x).detach())),
    "a function": lambda: lambda x: (x * x.detach()).sum(1),
}


@pytest.mark.parametrize("name", CUT)
def test_a_gradient_that_is_not_the_slope_is_told(name: str) -> None:
    found = only(CUT[name]())
    assert found.mistake == "cut"
    assert "autograd's gradient is not the slope of the scores" in found.text


def test_elements_that_autograd_is_blind_to_are_counted() -> None:
    found = only(Calls(lambda s, x: s.net(torch.cat([x[:, :4], x[:, 4:].detach()], 1))))
    assert found.mistake == "cut"
    assert "the scores change with 2 of the 6 elements" in found.text
    assert ".detach()" in found.text


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_that_meet_are_told_with_the_call() -> None:
    found = only(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    assert found.mistake == "samples meet"
    assert "(in batch_norm of layer 1)" in found.text


def test_samples_that_meet_outside_of_the_graph_are_told() -> None:
    assert mistakes(Calls(lambda s, x: s.net(x) * x.detach().mean())) == ["cut", "samples meet"]


@pytest.mark.parametrize(
    ("size", "said"),
    [(12, "4 scores for 8 samples, so each is that of a pack of 2"), (48, "one score for all 8 samples")],
    ids=["packs", "one score"],
)
def test_fewer_scores_than_samples_are_told(size: int, said: str) -> None:
    found = only(Calls(lambda s, x: s.net(x.reshape(-1, size)), mlp(size, 8, 1)))
    assert found.mistake == "fewer scores"
    assert said in found.text
    assert ("pass pack=2 to the penalty" in found.text) == (size == 12)


# --- what else --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [lambda s, x: s.net(F.dropout(x, 0.5)), lambda s, x: s.net(x + 0.1 * torch.randn_like(x))],
    ids=["dropout", "noise"],
)
def test_noise_that_is_left_on_in_eval_mode_is_told(how: Callable[[Any, Tensor], Tensor]) -> None:
    critic = Calls(how)
    found = only(critic)
    assert found.mistake == "not repeatable"
    assert "in eval mode" in found.text
    assert critic.training


def test_noise_of_a_generator_of_the_critics_own_is_told_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    assert mistakes(Calls(lambda s, x: s.net(x + torch.randn(x.shape, generator=generator)))) == ["not repeatable"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda s, x: 1e6 * s.net(x).float(), "input gradients"),
        (lambda s, x: s.net(x) * 1e6, "scores"),
        (lambda s, x: F.linear(300 * F.linear(300 * s.net(x), torch.full((1, 1), 300.0)), torch.ones(1, 1)), "scores"),
    ],
    ids=["a large factor in float32", "a large factor", "products"],
)
def test_overflow_under_float16_autocast_is_told(how: Callable[[Any, Tensor], Tensor], said: str) -> None:
    found = only(Calls(how), 10 * torch.randn(8, 6))
    assert found.mistake == "float16"
    assert f"the {said} are not finite" in found.text
    assert "gpkernels computes norms and losses in float32" in found.text


# --- the whole --------------------------------------------------------------------------------------------------------


def test_several_mistakes_are_told_in_one_go() -> None:
    critic = Calls(lambda s, x: F.dropout(s.net(x / x.detach().std(0)), 0.1))
    assert mistakes(critic) == ["cut", "samples meet", "not repeatable"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["a module", "a closure"])
def test_the_critic_and_the_random_numbers_stay_as_they_were(wrapped: bool) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    example, state = torch.randn(8, 6), torch.get_rng_state()
    lint_critic((lambda x: critic(x)) if wrapped else critic, example)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert all(m.training for m in critic.modules())
    assert all(p.grad is None and p.dtype == torch.float32 for p in critic.parameters())
    assert not example.requires_grad


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_critic_that_cannot_be_copied_is_called_itself() -> None:
    part = nn.utils.weight_norm(nn.Linear(6, 8))
    critic = nn.Sequential(part, nn.Tanh(), nn.Linear(8, 1)).double()
    example = torch.randn(8, 6, dtype=torch.float64)
    critic(example)
    assert mistakes(critic, example) == []
    assert mistakes(Calls(lambda s, x: s.net(x.detach() * x), critic), example) == ["cut"]
    assert all(p.dtype == torch.float64 for p in critic.parameters())
    assert critic.training


@pytest.mark.parametrize(
    ("critic", "example", "error", "said"),
    [
        (3, torch.randn(2, 2), TypeError, "critic: expected a module or a callable"),
        (mlp(2, 1), [1.0], TypeError, "example: expected a tensor"),
        (lambda x: "scores", torch.randn(2, 2), TypeError, "critic: expected scores as a tensor"),
        (mlp(3, 1), torch.randn(2, 2), RuntimeError, "shapes cannot be multiplied"),
    ],
    ids=["critic", "example", "scores", "the critic's own error"],
)
def test_bad_input_is_named(critic: Any, example: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        lint_critic(critic, example)


SOURCE = """
import torch
from torch import nn


class Right(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


class Mixing(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


class Cut(Right):
    def forward(self, x):
        return super().forward(x.detach())
"""


@pytest.mark.parametrize("command", [["explain"], ["verify", "--backend", "reference", "--critic"]], ids=lambda x: x[0])
@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
def test_the_shell_warns(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    name = f"critics_of_{command[0]}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, f"{name}:Right", "--input", "8x6"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*command, f"{name}:Mixing", "--input", "8x6"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a sample's score changes with the other samples of the batch (in batch_norm of")
    assert cli.main([*command, f"{name}:Cut", "--input", "8x6"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpkernels {command[0]}: {name}:Cut on 8x6: the scores change with the input, but autograd")


def test_images_of_a_residual_critic_are_right() -> None:
    assert mistakes(ResidualCritic(8, 8, "layer_norm"), torch.randn(2, 3, 8, 8)) == []
