"""Identification of a user's penalty function: the formula that it computes, and known mistakes.

The calls that the function makes show where it penalises and how eps was drawn. Each known formula is evaluated on the
gradient there and compared with the function's value, over batches of two sizes and critics of several slopes: the
formula whose ratio to the value is constant is the function's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.critic.call import check_scores, scores_of
from gpkernels.critic.follow import modules_of, restored
from gpkernels.ops.checks import check_callable, check_pair
from gpkernels.verify.formulas import ONE_SIDED, TWO_SIDED, ZERO_CENTRED, Formula, formulas
from gpkernels.verify.lint_critic import Finding, copied

SLOPES = (0.6, 1.0, 1.7, 3.0, 0.8, 2.2)  # mean norm of the input gradient in each trial
LEAST = 4  # samples, half of which are also used as a batch
CLOSE = 2e-3  # tolerance of values and gradients, in float32
ON_LINE = 1e-3  # tolerance of points and eps

BETWEEN, REAL, FAKE, NEAR_REAL = "between real and fake", "at real", "at fake", "near real"
OURS = {
    (TWO_SIDED, BETWEEN): "gpkernels.gradient_penalty(critic, real, fake)",
    (ONE_SIDED, BETWEEN): "gpkernels.gradient_penalty(critic, real, fake, one_sided=True)",
    (ZERO_CENTRED, BETWEEN): "gpkernels.gradient_penalty(critic, real, fake, target=0)",
    (ZERO_CENTRED, REAL): "gpkernels.r1_penalty(critic, real)",
    (ZERO_CENTRED, FAKE): "gpkernels.r2_penalty(critic, fake)",
    (TWO_SIDED, NEAR_REAL): "gpkernels.dragan_penalty(critic, real), or one with other noise",
}


@dataclass(frozen=True)
class PenaltyLint:
    """Description of a penalty function.

    formula: the formula of its values, "" if it is unknown. factor: multiple of the formula, such as lambda. findings:
    its mistakes; empty for a correct function.
    """

    formula: str
    factor: float
    findings: list[Finding]

    def __str__(self) -> str:
        values = f"its values are {self.factor:.4g} x {self.formula}" if self.formula else ""
        lines = [values] * bool(values) + [f"mistake: {finding}" for finding in self.findings]
        return "\n".join(lines if self.findings else [f"{values}, and so are its weight gradients"])


def lint_penalty(
    function: Callable[[Any, Tensor, Tensor], Any], critic: Callable[..., Any], real: Tensor, fake: Tensor
) -> PenaltyLint:
    """Identify what a penalty function of (critic, real, fake) computes, and which mistakes it makes.

    The function is called with a copy of the critic in eval mode, whose scores are scaled so that its input gradients
    have norms about 1; a critic that cannot be copied is wrapped instead. Mistakes: "norm over channels", "norm over
    axis 2" and so on, "norm per element", "norm over the batch", "norm along the batch", "mean in the norm", "absolute
    values in the norm", "missing square", "absolute value for the square", "missing root", "mean before the square",
    "two-sided, summed", "zero-centred, summed", "negative", "eps per element", "one eps", "eps beyond 0 and 1", "real
    alone", "fake alone", "no graph", "other gradients", "not finite at zero", "critic not called", "unknown".

    Args:
        function (Callable): maps (critic, real, fake) to the penalty, or to a tuple with the penalty first.
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with the scores
            first.
        real (Tensor): at least 4 samples that differ from each other.
        fake (Tensor): as many samples of the same shape.

    Shape:
        - real, fake: :math:`(N, *)`

    Returns:
        PenaltyLint: the formula, its factor and the mistakes.

    Raises:
        TypeError: ``function`` or ``critic`` cannot be called, or a tensor is not a dense floating-point tensor.
        ValueError: shapes or devices differ, there are too few samples, or the critic's gradient is zero or not finite.
    """
    check_callable("function", function)
    check_callable("critic", critic)
    check_pair("real", real, "fake", fake)
    if len(real) < LEAST:
        raise ValueError(f"real: expected at least {LEAST} samples, got {len(real)}")
    with torch.enable_grad():
        return _Lint(function, critic, real.detach(), fake.detach()).run()


@dataclass(frozen=True)
class _Trial:
    """One call of the function. points: where it penalised, None if unknown. gradient: the critic's at the points."""

    real: Tensor
    fake: Tensor
    value: Tensor
    points: Tensor | None
    gradient: Tensor | None


class _Stage:
    """The critic for the function: it scales the scores, and records the batches that it is called with."""

    def __init__(self, critic: Callable[..., Any]) -> None:
        self.factor, self.seen = 1.0, list[Tensor]()
        twin = copied(critic)
        if twin is None:
            self.critic: Callable[..., Any] = lambda *args, **kwargs: self._watched(args, critic(*args, **kwargs))
        else:
            twin.eval().register_forward_hook(lambda _, args, output: self._watched(args, output))
            self.critic = twin
        self.modules = [module for _, module in modules_of(critic if twin is None else twin)]

    def _watched(self, args: Sequence[Any], output: Any) -> Any:
        self.seen += [x for x in args[:1] if isinstance(x, Tensor)]
        if isinstance(output, (tuple, list)):
            return (scores_of(output) * self.factor, *output[1:])
        return scores_of(output) * self.factor

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient of the summed scores at some points, with a graph to the weights."""
        x = x.detach().requires_grad_()
        scores = scores_of(self.critic(x))
        check_scores(scores, x, 1)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return gradient


class _Lint:
    def __init__(self, function: Callable[..., Any], critic: Callable[..., Any], real: Tensor, fake: Tensor) -> None:
        self.function, self.stage = function, _Stage(critic)
        self.real, self.fake = real, fake
        norm = self.stage.gradient(real).detach().flatten(1).norm(2, dim=1).mean()
        if not 0 < norm < math.inf:
            raise ValueError(f"critic: expected input gradients of a positive norm at real, got {norm:.3g} on average")
        self.unit = 1 / float(norm)

    def run(self) -> PenaltyLint:
        trials = [self._trial(i) for i in range(len(SLOPES))]
        if not any(trial.points is not None for trial in trials):
            return PenaltyLint("", 0.0, [_uncalled()])
        known = [t for t in trials if t.points is not None and t.gradient is not None]
        where, findings = self._where(known)
        formula, factor = _fitting(known)
        if formula is None:
            return PenaltyLint("", 0.0, [*findings, _unknown(known[0], self.real.dim())])
        if where in (REAL, FAKE) and formula.name != ZERO_CENTRED:
            findings.append(_alone(where))
        if formula.text:
            findings.insert(0, Finding(formula.name, formula.text))
        if factor < 0:
            findings.append(_negative())
        findings += self._gradients(known[-1], formula, factor)
        findings += self._at_zero()
        name = f"the {formula.name} penalty {where}"
        if formula.text:
            name = f'the penalty {where} with "{formula.name}"'
        elif not findings:
            name = OURS.get((formula.name, where), name)
        return PenaltyLint(name, factor, findings)

    # --- trials -------------------------------------------------------------------------------------------------------

    def _trial(self, i: int) -> _Trial:
        """Call the function once; batches of two sizes alternate."""
        n = len(self.real) // (1 + i % 2)
        real, fake = (x.roll(i, 0)[:n].clone() for x in (self.real, self.fake))
        self.stage.factor = SLOPES[i] * self.unit
        value, points = self._called(i, real, fake)
        return _Trial(real, fake, value, points, None if points is None else self.stage.gradient(points))

    def _called(self, seed: int, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the function's value and its points: the last batch for the critic, other than real and fake."""
        self.stage.seen.clear()
        with restored(self.stage.modules, real.device):
            torch.manual_seed(seed)
            found = self.function(self.stage.critic, real.clone(), fake.clone())
        value = found[0] if isinstance(found, (tuple, list)) and found else found
        if not isinstance(value, Tensor):
            raise TypeError(f"function: expected a tensor from (critic, real, fake), got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"function: expected one number, got shape {tuple(value.shape)}")
        seen = [x.detach() for x in self.stage.seen if x.requires_grad and x.shape == real.shape]
        others = [x for x in seen if not (_same(x, real) or _same(x, fake))]
        found_at = others or seen
        return value.reshape(()), found_at[-1] if found_at else None

    # --- points -------------------------------------------------------------------------------------------------------

    def _where(self, trials: Sequence[_Trial]) -> tuple[str, list[Finding]]:
        for place, of in ((REAL, lambda t: t.real), (FAKE, lambda t: t.fake)):
            if all(t.points is not None and _same(t.points, of(t)) for t in trials):
                return place, []
        each, off = zip(*(_eps(t) for t in trials), strict=True)
        if max(float(x.max()) for x in off) > ON_LINE:
            if self._ignores_fake():
                return NEAR_REAL, []
            return BETWEEN, [_per_element()]
        findings = []
        if all(float(e.max() - e.min()) < ON_LINE for e in each):
            findings.append(_one_eps())
        if any(float(e.min()) < -ON_LINE or float(e.max()) > 1 + ON_LINE for e in each):
            findings.append(_beyond())
        return BETWEEN, findings

    def _ignores_fake(self) -> bool:
        found = [self._called(0, self.real, fake)[1] for fake in (self.fake, self.fake + 1)]
        return found[0] is not None and found[1] is not None and _same(found[0], found[1])

    # --- weight gradients ---------------------------------------------------------------------------------------------

    def _gradients(self, trial: _Trial, formula: Formula, factor: float) -> Iterator[Finding]:
        assert trial.gradient is not None
        weights = self._weights()
        ours = factor * formula.of(trial.gradient)
        if not (weights and ours.requires_grad):
            return
        exact = _vector(torch.autograd.grad(ours, weights, allow_unused=True), weights)
        if not trial.value.requires_grad:
            yield _no_graph()
            return
        got = _vector(torch.autograd.grad(trial.value, weights, allow_unused=True), weights)
        if exact.any() and not got.any():
            yield _no_graph()
        elif (apart := float((got - exact).norm())) > CLOSE * float(exact.norm()):
            yield _other_gradients(apart / float(exact.norm()))

    def _at_zero(self) -> Iterator[Finding]:
        """Check the weight gradients where scores do not depend on the input."""
        self.stage.factor = 0.0
        value, _ = self._called(0, self.real, self.fake)
        weights = self._weights()
        found: Sequence[Tensor | None] = ()
        if weights and value.requires_grad:
            found = torch.autograd.grad(value, weights, allow_unused=True)
        if not all(x.isfinite().all() for x in (value, *found) if x is not None):
            yield _not_finite()

    def _weights(self) -> list[nn.Parameter]:
        return list({w: None for m in self.stage.modules for w in m.parameters() if w.requires_grad})


def _fitting(trials: Sequence[_Trial]) -> tuple[Formula | None, float]:
    """Return the first formula that matches all values, and its factor."""
    values = torch.stack([t.value.detach().double() for t in trials])
    for formula in formulas(trials[0].real.dim()):
        with torch.no_grad():
            found = torch.stack([formula.of(t.gradient).double() for t in trials if t.gradient is not None])
        factor = float((values * found).sum() / found.square().sum()) if found.any() else 0.0
        if factor and float((values - factor * found).abs().max()) <= CLOSE * float(values.abs().mean()):
            return formula, factor
    return None, 0.0


def _eps(trial: _Trial) -> tuple[Tensor, Tensor]:
    """Return each sample's eps, and its point's relative distance from the line between real and fake."""
    assert trial.points is not None
    line, way = ((x - trial.fake).flatten(1).double() for x in (trial.real, trial.points))
    eps = (way * line).sum(1) / line.square().sum(1)
    return eps, (way - eps[:, None] * line).norm(dim=1) / line.norm(dim=1)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _vector(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    return torch.cat([g.flatten().double() for g in parts])


# --- messages ---------------------------------------------------------------------------------------------------------


def _uncalled() -> Finding:
    return Finding(
        "critic not called",
        "the function did not call its first argument on a batch that requires a gradient: it has to take "
        "(critic, real, fake), and to call this critic on real, fake or points computed from them",
    )


def _unknown(trial: _Trial, axes: int) -> Finding:
    assert trial.gradient is not None
    got, right = float(trial.value.detach()), float(next(formulas(axes)).of(trial.gradient.detach()))
    return Finding(
        "unknown",
        f"no known formula gives its values: one is {got:.4g}, and the two-sided penalty "
        f"of the same points is {right:.4g}; other loss terms, or a target other than 1, may be the reason",
    )


def _alone(where: str) -> Finding:
    which = where.removeprefix("at ")
    return Finding(
        f"{which} alone",
        f"the gradient is penalised {where} samples alone, not between real and fake, where WGAN-GP needs its norm "
        "to be 1; call the critic on (eps * real + (1 - eps) * fake).detach().requires_grad_()",
    )


_DRAW = "draw it as torch.rand(N, 1, 1, 1) for images, torch.rand(N, 1) for rows of numbers"


def _per_element() -> Finding:
    return Finding(
        "eps per element",
        "eps differs between the elements of a sample, so points do not lie on the lines between real and fake "
        f"(torch.rand_like(real) does this, and so does torch.rand of a shape that broadcasts differently); {_DRAW}",
    )


def _one_eps() -> Finding:
    return Finding("one eps", f"all samples of a batch have the same eps (torch.rand(1) does this); {_DRAW}")


def _beyond() -> Finding:
    return Finding(
        "eps beyond 0 and 1",
        f"eps is not between 0 and 1, so points lie beyond real and fake (torch.randn does this); {_DRAW}",
    )


def _negative() -> Finding:
    return Finding("negative", "the penalty is negative, so it rewards steep slopes: add it to the loss")


def _no_graph() -> Finding:
    return Finding(
        "no graph",
        "the value has no gradient with respect to the critic's weights, so it has no effect: pass create_graph=True "
        "to torch.autograd.grad, and do not use .detach(), .data or .item() on its result",
    )


def _other_gradients(share: float) -> Finding:
    return Finding(
        "other gradients",
        f"the value is that of the formula, but its weight gradients are {100 * share:.1f} % off: a part of it is "
        "detached, or computed in no_grad mode",
    )


def _not_finite() -> Finding:
    return Finding(
        "not finite at zero",
        "where an input gradient is zero the weights get NaN, as the square root has no derivative at 0: use "
        "grad.flatten(1).norm(2, dim=1), or add 1e-12 to the sum of squares before .sqrt()",
    )
