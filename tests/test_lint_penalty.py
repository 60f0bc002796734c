"""A user's penalty is recognised: right ones as such, and each mistake of public code by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from critics import Featured, dcgan, mlp
from gpkernels import cli
from gpkernels.verify.lint_penalty import PenaltyLint, lint_penalty

SHAPES = {"rows": (8, 6), "images": (8, 3, 8, 8)}


def linted(function: Callable[..., Any], kind: str = "images", critic: Callable[..., Any] | None = None) -> PenaltyLint:
    torch.manual_seed(0)
    if critic is None:
        critic = dcgan(3, 8, 8) if kind == "images" else mlp(6, 32, 1, activation=nn.Tanh)
    return lint_penalty(function, critic, torch.randn(SHAPES[kind]), 0.3 + 0.7 * torch.randn(SHAPES[kind]))


def mistakes(function: Callable[..., Any], kind: str = "images") -> list[str]:
    return [finding.mistake for finding in linted(function, kind).findings]


def gradient(critic: Any, x: Tensor, create_graph: bool = True) -> Tensor:
    x = x.detach().requires_grad_()
    scores = critic(x)
    (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=create_graph, retain_graph=True)
    return grad


def per_sample(real: Tensor) -> Tensor:
    return torch.rand(len(real), *[1] * (real.dim() - 1))


def penalty(of: Callable[[Tensor], Tensor], draw: Callable[[Tensor], Tensor] = per_sample, **options: Any) -> Any:
    """A penalty as public code has it, with a part of it changed."""

    def function(critic: Any, real: Tensor, fake: Tensor) -> Tensor:
        eps = draw(real)
        return 10 * of(gradient(critic, eps * real + (1 - eps) * fake, **options))

    return function


def two_sided(g: Tensor) -> Tensor:
    return ((g.reshape(len(g), -1).norm(2, dim=1) - 1) ** 2).mean()


# --- right ones -------------------------------------------------------------------------------------------------------


def with_a_root(g: Tensor) -> Tensor:
    return ((torch.sqrt(g.pow(2).flatten(1).sum(1) + 1e-12) - 1) ** 2).mean()


def swapped(critic: Any, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """eps before the fake samples, and the gradient given back, too; scores of real and fake beside it."""
    critic(real), critic(fake)
    eps = per_sample(real).expand_as(real)
    g = gradient(critic, eps * fake + (1 - eps) * real)
    return two_sided(g), g


def by_scale(critic: Any, real: Tensor, fake: Tensor) -> Tensor:
    """CTGAN's and others' way: a factor inside."""
    return two_sided(gradient(critic, real + per_sample(real) * (fake - real))) * 10.0


PLAIN = "gpkernels.gradient_penalty(critic, real, fake)"
RIGHT: dict[str, tuple[Callable[..., Any], str, float]] = {
    "as usual": (penalty(two_sided), PLAIN, 10),
    "a root with an epsilon": (penalty(with_a_root), PLAIN, 10),
    "eps the other way round": (swapped, PLAIN, 1),
    "from real to fake": (by_scale, PLAIN, 10),
    "ours": (gpk.gradient_penalty, PLAIN, 1),
    "one-sided": (
        penalty(lambda g: (g.flatten(1).norm(dim=1) - 1).clamp(min=0).square().mean()),
        "gpkernels.gradient_penalty(critic, real, fake, one_sided=True)",
        10,
    ),
    "R1": (
        lambda critic, real, fake: 5 * gradient(critic, real).pow(2).flatten(1).sum(1).mean(),
        "gpkernels.r1_penalty(critic, real)",
        5,
    ),
    "our R2": (lambda critic, real, fake: gpk.r2_penalty(critic, fake), "gpkernels.r2_penalty(critic, fake)", 1),
    "DRAGAN": (
        lambda critic, real, fake: gpk.dragan_penalty(critic, real),
        "gpkernels.dragan_penalty(critic, real), or one with other noise",
        1,
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_penalty_is_named_with_its_factor(name: str, kind: str) -> None:
    function, formula, factor = RIGHT[name]
    found = linted(function, kind)
    assert found.findings == []
    assert found.formula == formula
    assert found.factor == pytest.approx(factor, rel=1e-3)
    assert str(found) == f"its values are {factor:g} x {formula}, and so are its weight gradients"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def at(which: str) -> Callable[..., Tensor]:
    def function(critic: Any, real: Tensor, fake: Tensor) -> Tensor:
        return 10 * two_sided(gradient(critic, {"real": real, "fake": fake}[which]))

    return function


def norms(g: Tensor) -> Tensor:
    return g.flatten(1).norm(2, dim=1)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "norm over channels": (penalty(lambda g: ((g.norm(2, dim=1) - 1) ** 2).mean()), "over the channels alone"),
    "norm over axis 3": (penalty(lambda g: ((g.norm(2, dim=-1) - 1) ** 2).mean()), "over axis 3 alone"),
    "norm per element": (penalty(lambda g: ((g.abs() - 1) ** 2).mean()), "there is no norm"),
    "norm over the batch": (penalty(lambda g: (g.norm(2) - 1) ** 2), "one norm for the whole batch"),
    "norm along the batch": (penalty(lambda g: ((g.norm(2, dim=0) - 1) ** 2).mean()), "along the batch (dim=0)"),
    "mean in the norm": (
        penalty(lambda g: (((g.flatten(1).pow(2).mean(1) + 1e-12).sqrt() - 1) ** 2).mean()),
        "the mean of squares instead of their sum",
    ),
    "absolute values in the norm": (
        penalty(lambda g: ((g.flatten(1).norm(1, dim=1) - 1) ** 2).mean()),
        "the sum of absolute values",
    ),
    "missing square": (penalty(lambda g: (norms(g) - 1).mean()), "the square is missing"),
    "absolute value for the square": (penalty(lambda g: (norms(g) - 1).abs().mean()), "instead of the square"),
    "missing root": (penalty(lambda g: ((norms(g) ** 2 - 1) ** 2).mean()), "the root is missing"),
    "mean before the square": (penalty(lambda g: (norms(g).mean() - 1) ** 2), "the mean is taken before"),
    "two-sided, summed": (penalty(lambda g: ((norms(g) - 1) ** 2).sum()), "summed over the batch"),
    "zero-centred, summed": (penalty(lambda g: (norms(g) ** 2).sum()), "summed over the batch"),
    "negative": (penalty(lambda g: -two_sided(g)), "the penalty is negative"),
    "eps per element": (penalty(two_sided, torch.rand_like), "eps differs between the elements"),
    "one eps": (penalty(two_sided, lambda real: torch.rand(1)), "all samples of a batch have the same eps"),
    "eps beyond 0 and 1": (penalty(two_sided, lambda real: torch.randn_like(per_sample(real))), "between 0 and 1"),
    "real alone": (at("real"), "at real samples alone"),
    "fake alone": (at("fake"), "at fake samples alone"),
    "no graph": (penalty(two_sided, create_graph=False), "create_graph=True"),
    "other gradients": (
        penalty(lambda g: ((norms(g) - 1) * (norms(g) - 1).detach()).mean()),
        "the value is that of the formula, but its weight gradients are 50.0 % off",
    ),
    "not finite at zero": (
        penalty(lambda g: ((g.pow(2).flatten(1).sum(1).sqrt() - 1) ** 2).mean()),
        "the weights get NaN",
    ),
    "unknown": (penalty(lambda g: ((norms(g) - 2) ** 2).mean()), "no known formula"),
    "critic not called": (lambda critic, real, fake: (real - fake).square().mean(), "did not call its first argument"),
}
OF_IMAGES = ("norm over channels", "norm over axis 3")


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in WRONG for kind in SHAPES if kind == "images" or name not in OF_IMAGES]
)
def test_each_mistake_is_named(name: str, kind: str) -> None:
    function, said = WRONG[name]
    found = linted(function, kind)
    assert [f.mistake for f in found.findings] == [name]
    assert said in found.findings[0].text
    assert f"mistake: {found.findings[0]}" in str(found)
    assert "gpkernels." not in found.formula


def test_every_mistake_that_is_promised_is_tested() -> None:
    promised = " ".join((lint_penalty.__doc__ or "").split())
    assert all(f'"{name}"' in promised for name in WRONG if name not in OF_IMAGES)


def test_mistakes_of_eps_and_of_the_norm_are_told_together() -> None:
    function = penalty(
        lambda g: ((g.pow(2).sum(1).sqrt() - 1) ** 2).mean(), lambda real: torch.randn(1, device=real.device)
    )
    assert mistakes(function) == ["norm over channels", "one eps", "eps beyond 0 and 1", "not finite at zero"]


def test_eps_that_broadcasts_along_the_wrong_axis_is_found() -> None:
    assert mistakes(penalty(two_sided, lambda real: torch.rand(real.shape[-1]))) == ["eps per element"]


def test_numpys_random_numbers_are_taken() -> None:
    numpy = pytest.importorskip("numpy")
    draw = lambda real: torch.from_numpy(numpy.random.random((len(real), 1, 1, 1))).float()  # noqa: E731
    assert mistakes(penalty(two_sided, draw)) == []


@pytest.mark.parametrize("kind", ["a closure", "features beside the scores", "weights that cannot be copied"])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_critics_of_other_kinds_are_taken(kind: str) -> None:
    net = mlp(6, 32, 1, activation=nn.Tanh)
    critic = {
        "a closure": lambda x: net(x),
        "features beside the scores": Featured(),
        "weights that cannot be copied": nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), mlp(8, 1)),
    }[kind]

    def function(critic: Any, real: Tensor, fake: Tensor, square: float = 2.0) -> Tensor:
        x = (real + per_sample(real) * (fake - real)).requires_grad_()
        scores = critic(x)
        scores = scores[0] if isinstance(scores, tuple) else scores
        (g,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return ((g.norm(dim=1) - 1) ** square).mean()

    assert linted(function, "rows", critic).findings == []
    wrong = lambda *batch: function(*batch, square=1.0)  # noqa: E731
    assert [f.mistake for f in linted(wrong, "rows", critic).findings] == ["missing square"]


def test_the_critic_and_the_random_numbers_stay_as_they_were() -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    batch, state = [torch.randn(8, 6) for _ in range(2)], torch.get_rng_state()
    kept = [x.clone() for x in batch]
    assert lint_penalty(penalty(two_sided), critic, *batch).findings == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(batch, kept, strict=True))
    assert critic.training
    assert not critic._forward_hooks
    assert all(p.grad is None for p in critic.parameters())


ROWS = torch.randn(8, 6)


@pytest.mark.parametrize(
    ("function", "critic", "batch", "error", "said"),
    [
        (3, mlp(6, 1), (ROWS, ROWS), TypeError, "function: expected a module or a callable, got int"),
        (two_sided, 3, (ROWS, ROWS), TypeError, "critic: expected a module or a callable, got int"),
        (two_sided, mlp(6, 1), (ROWS, ROWS[:4]), ValueError, "fake: expected the shape of real"),
        (two_sided, mlp(6, 1), (ROWS[:3], ROWS[:3]), ValueError, "real: expected at least 4 samples, got 3"),
        (lambda *a: 1.0, mlp(6, 1), (ROWS, ROWS), TypeError, "function: expected a tensor from (critic, real, fake)"),
        (lambda *a: ROWS, mlp(6, 1), (ROWS, ROWS), ValueError, "function: expected one number, got shape (8, 6)"),
        (two_sided, lambda x: 0 * x.sum(1), (ROWS, ROWS), ValueError, "at real, got 0 on average"),
        (
            two_sided,
            mlp(6, 8, 1, activation=nn.Tanh),
            (ROWS * torch.nan, ROWS),
            ValueError,
            "at real, got nan on average",
        ),
        (two_sided, lambda x: x.reshape(4, 12).sum(1), (ROWS, ROWS), ValueError, "critic: expected a score for each"),
    ],
    ids=["function", "critic", "fake", "few samples", "a float", "a batch", "no gradient", "samples of NaN", "packs"],
)
def test_bad_input_is_named(function: Any, critic: Any, batch: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        lint_penalty(function, critic, *batch)
    assert said in str(caught.value)


SOURCE = """
import torch
from torch import nn


class Critic(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 1))


def right(critic, real, fake):
    eps = torch.rand(len(real), 1, 1, 1)
    x = (eps * real + (1 - eps) * fake).requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return 10 * ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def wrong(critic, real, fake):
    eps = torch.rand(len(real), 1, 1, 1)
    x = (eps * real + (1 - eps) * fake).requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return 10 * ((g.norm(2, dim=1) - 1) ** 2).mean()


def longer(critic, real, fake, device):
    return real.sum()
"""


def test_the_shell_tells_what_a_penalty_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "mypenalty.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    critic = ["--critic", "mypenalty:Critic", "--input", "8x3x8x8"]
    assert cli.main(["verify", *critic, "--penalty", "mypenalty:right"]) == 0
    page = capsys.readouterr().out
    assert f"mypenalty:right: its values are 10 x {PLAIN}, and so are its weight gradients" in page
    assert cli.main(["verify", *critic, "--penalty", "mypenalty:wrong"]) == 1
    page = capsys.readouterr().out
    assert 'its values are 10 x the penalty between real and fake with "norm over channels"' in page
    assert "mistake: the norm is over the channels alone" in page
    for given, said in (
        ([*critic, "--penalty", "mypenalty"], "penalty: expected module:function, got 'mypenalty'"),
        ([*critic, "--penalty", "mypenalty:none"], "mypenalty:none: AttributeError"),
        ([*critic, "--penalty", "mypenalty:longer"], "TypeError: longer() missing 1 required positional argument"),
        (["--penalty", "mypenalty:right"], "--penalty: expected with --critic and --input"),
    ):
        assert cli.main(["verify", *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
