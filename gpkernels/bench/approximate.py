"""Error of `approximate_r1_penalty` and cost of both penalties: `gpkernels explain --approximate`.

The spread of the estimates would hide their bias. The bias is therefore that of the difference from the linear estimate
with the same noise, mean (grad D(x) . noise)^2 in float64, whose expectation is the exact penalty.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkernels as gpk
from gpkernels.bench.clock import Call, time_in_turns
from gpkernels.bench.counts import watched
from gpkernels.critic.call import scores_of
from gpkernels.ops.checks import check_batch
from gpkernels.zoo import plain_penalty

SIGMAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DRAWS = 200
AUTOCAST = "bfloat16 autocast"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, AUTOCAST: torch.float32}
OURS, EAGER, APPROXIMATE = "r1_penalty", "R1 in eager PyTorch", "approximate_r1_penalty"


@dataclass(frozen=True)
class Errors:
    """Errors relative to the exact value, or to the 2-norm of the exact weight gradients.

    bias: of the mean over draws; for gradients, its norm. uncertainty: the bias's standard error. spread: the standard
    deviation of one draw.
    """

    bias: float
    uncertainty: float
    spread: float


@dataclass(frozen=True)
class Row:
    """Errors for one sigma, or for the penalty of exact derivatives, where sigma is None.

    The exact value is the float64 penalty of the critic with the weights and the data of that precision.
    """

    precision: str
    sigma: float | None
    value: Errors
    gradients: Errors


@dataclass(frozen=True)
class Cost:
    """Cost of a call with its weight gradients, in float32. flops: of products, convolutions. cpu: minimum, in us."""

    flops: int
    cpu: float


@dataclass(frozen=True)
class Comparison:
    """Result of ``compare``; ``str`` formats it as two tables. exact: the float64 penalty of the critic as it is."""

    exact: float
    samples: int
    draws: int
    rows: list[Row]
    costs: dict[str, Cost]

    def __str__(self) -> str:
        lines = [
            f"approximate_r1_penalty beside the exact {self.exact:.4g}: {self.samples} samples, {self.draws} draws of "
            "noise, eval mode",
            "shares of the exact value, and of the norm of its weight gradients; +- is the bias's standard error",
            f"{'':17} {'':>7}  {'value':>28}  {'weight gradients':>28}",
            f"{'critic in':17} {'sigma':>7}" + 2 * f"  {'bias':>10} {'+-':>8} {'spread':>8}",
        ]
        for row in self.rows:
            sigma = "exact" if row.sigma is None else f"{row.sigma:g}"
            errors = "".join(
                f"  {e.bias:{sign}10.1e} {e.uncertainty:8.0e} {e.spread:8.1e}"
                for e, sign in ((row.value, "+"), (row.gradients, ""))
            )
            lines.append(f"{row.precision:17} {sigma:>7}{errors}")
        lines += ["", f"{'one call with its weight gradients':36} {'MFLOP':>10} {'CPU us':>10}"]
        lines += [f"{name:36} {cost.flops / 1e6:10.3f} {cost.cpu:10.0f}" for name, cost in self.costs.items()]
        return "\n".join(lines)


def compare(
    critic: nn.Module,
    real: Tensor,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = DRAWS,
    seconds: float = 1.0,
) -> Comparison:
    """Measure error and cost of a critic's approximate R1 penalty on some data.

    Copies of the critic run in eval mode, as dropout would count as an effect of the noise. Draw k has the noise of a
    generator with seed k, in every precision and for every sigma.

    Args:
        critic (nn.Module): the critic, with weights that require gradients.
        real (Tensor): the data.
        sigmas (Sequence[float]): standard deviations of the noise. Default: ``SIGMAS``.
        draws (int): number of draws of noise, at least 2. Default: 200.
        seconds (float): approximate time to spend on timing each call. Default: 1.

    Shape:
        - real: :math:`(N, *)`

    Returns:
        Comparison: errors and costs.

    Raises:
        TypeError: the critic is not a module, or ``real`` not a dense floating-point tensor.
        ValueError: the batch is empty, ``draws`` is below 2, or the critic has no weights to train or no input
            gradient.
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"critic: expected a torch.nn.Module, got {type(critic).__name__}")
    check_batch("real", real)
    if draws < 2:
        raise ValueError(f"draws: expected at least 2, to have a spread, got {draws}")
    if not _weights(critic):
        raise ValueError("critic: expected weights that are trained, got none")
    critic, real = copy.deepcopy(critic).eval(), real.detach()
    exact = float(_Linear(copy.deepcopy(critic).double(), real.double()).value)
    rows = [row for name in PRECISIONS for row in _rows(name, critic, real, sigmas, draws)]
    return Comparison(exact, len(real), draws, rows, _costs(critic.float(), real.float(), seconds))


def write_json(path: Path, comparison: Comparison) -> None:
    """Write all numbers as JSON, with the conditions that they were measured under."""
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), **asdict(comparison)}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


# --- errors -----------------------------------------------------------------------------------------------------------


class _Sums:
    """Mean of vectors, and their standard deviation in the 2-norm."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, x: Tensor) -> None:
        self.count, self.total = self.count + 1, self.total + x
        self.squares += float(x.square().sum())

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def deviation(self) -> float:
        excess = self.squares - self.count * float(self.mean.square().sum())
        return math.sqrt(max(0.0, excess) / (self.count - 1))


class _Errors:
    """Errors of draws, whose bias is measured against their linear estimates."""

    def __init__(self, exact: Tensor) -> None:
        self.norm, self.draws, self.beside = float(exact.norm()), _Sums(), _Sums()

    def add(self, draw: Tensor, linear: Tensor) -> None:
        self.draws.add(draw)
        self.beside.add(draw - linear)

    def found(self) -> Errors:
        mean = self.beside.mean
        bias = float(mean) if mean.dim() == 0 else float(mean.norm())
        error = self.beside.deviation / math.sqrt(self.beside.count)
        return Errors(bias / self.norm, error / self.norm, self.draws.deviation / self.norm)


class _Linear:
    """The penalty in float64, and draws of its linear estimate."""

    def __init__(self, critic: nn.Module, real: Tensor) -> None:
        self.weights = _weights(critic)
        with _twice_differentiable():
            self.x = real.detach().requires_grad_()
            (self.grad,) = torch.autograd.grad(scores_of(critic(self.x)).sum(), self.x, create_graph=True)
        self.value, self.gradients = self._of(self.grad.flatten(1).square().sum(1).mean())
        if not self.value > 0:
            raise ValueError(f"critic: expected scores with a gradient, got a penalty of {float(self.value)}")

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        noise = gpk.add_instance_noise(torch.zeros_like(self.grad), 1.0, generator=_seeded(seed, self.grad))
        return self._of((self.grad * noise).flatten(1).sum(1).square().mean())

    def _of(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return _value_and_gradient(value, self.weights, retain_graph=True)


def _rows(precision: str, critic: nn.Module, real: Tensor, sigmas: Sequence[float], draws: int) -> list[Row]:
    dtype, automatic = PRECISIONS[precision], precision == AUTOCAST
    low, x = copy.deepcopy(critic).to(dtype), real.to(dtype)
    weights = _weights(low)
    linear = _Linear(copy.deepcopy(low).double(), x.double())

    def found(penalty: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16) if automatic else nullcontext():
            value = penalty()
        return _value_and_gradient(value, weights)

    with _twice_differentiable():
        value, gradients = found(lambda: gpk.r1_penalty(low, x))
    own = (value / linear.value - 1, (gradients - linear.gradients).norm() / linear.gradients.norm())
    rows = [Row(precision, None, *(Errors(float(bias), 0.0, 0.0) for bias in own))]
    sums = {sigma: (_Errors(linear.value), _Errors(linear.gradients)) for sigma in sigmas}
    for seed in range(draws):
        beside = linear.draw(seed)
        for sigma, errors in sums.items():
            generator = _seeded(seed, x)
            drawn = found(lambda: gpk.approximate_r1_penalty(low, x, sigma, generator=generator))  # noqa: B023
            for error, got, expected in zip(errors, drawn, beside, strict=True):
                error.add(got, expected)
    return rows + [Row(precision, sigma, *(e.found() for e in errors)) for sigma, errors in sums.items()]


def _value_and_gradient(value: Tensor, weights: Sequence[Tensor], retain_graph: bool = False) -> tuple[Tensor, Tensor]:
    """Return the value and its weight gradients as one vector, in float64."""
    found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=retain_graph)
    parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    return value.detach().double(), torch.cat([g.flatten().double() for g in parts])


def _weights(critic: nn.Module) -> list[nn.Parameter]:
    return [p for p in critic.parameters() if p.requires_grad]


def _seeded(seed: int, like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)


def _twice_differentiable() -> AbstractContextManager[None]:
    """Select an implementation of attention that has a second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


# --- cost -------------------------------------------------------------------------------------------------------------


def _costs(critic: nn.Module, real: Tensor, seconds: float) -> dict[str, Cost]:
    """Measure the calls in turns, under the same load; exact penalties use attention that has a second derivative."""
    weights = _weights(critic)

    def gradients(penalty: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(penalty(), weights, allow_unused=True)

    def exact(penalty: Callable[[], Tensor]) -> Call:
        call = gradients(penalty)

        def run() -> object:
            with _twice_differentiable():
                return call()

        return run

    calls = {
        OURS: exact(lambda: gpk.r1_penalty(critic, real)),
        EAGER: exact(lambda: plain_penalty(critic, real, 0.0)),
        APPROXIMATE: gradients(lambda: gpk.approximate_r1_penalty(critic, real)),
    }
    times = time_in_turns(calls, real.device, seconds)  # also warms up each call
    return {name: Cost(watched(call).flops, times[name].cpu) for name, call in calls.items()}
