"""Properties of a critic that make its penalty wrong, found by calling the critic.

`gpkernels explain` and `gpkernels verify --critic` print them as warnings.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.critic.call import scores_of
from gpkernels.critic.explain import explain
from gpkernels.critic.follow import modules_of, restored
from gpkernels.critic.uncompiled import uncompiled
from gpkernels.ops.checks import check_batch, check_callable

NO_GRADIENT = "no gradient"
POINTS = 5  # a kink may be close to one, and the cut part of the gradient orthogonal to a direction
APART = 0.02  # relative difference of derivatives, far above that by rounding or a kink


@dataclass(frozen=True)
class Finding:
    """Mistake that was found. mistake: its name, stable across versions. text: observation, effect and remedy."""

    mistake: str
    text: str

    def __str__(self) -> str:
        return self.text


def lint_critic(critic: Callable[..., Any], example: Tensor) -> list[Finding]:
    """Find what makes a critic's penalty wrong, by calling a copy in float64 at and near an example batch.

    A critic that cannot be copied is called itself, in its own dtype, and its state is restored. The training mode
    matters: with BatchNorm in eval mode samples do not interact. Mistakes, in order: "no gradient", "cut", "fewer
    scores", "samples meet", "not repeatable", "float16".

    Args:
        critic (Callable): a module or any other callable that maps a batch to scores, or to a tuple with the scores
            first.
        example (Tensor): a batch as the critic is called with in training.

    Shape:
        - example: :math:`(N, *)`

    Returns:
        list[Finding]: the mistakes; empty if there are none.

    Raises:
        TypeError: the critic cannot be called or returns no tensor, or ``example`` is not a dense floating-point
            tensor.
        ValueError: ``example`` is empty.
    """
    check_callable("critic", critic)
    check_batch("example", example)
    with torch.enable_grad(), uncompiled():
        return list(_Lint(critic, example.detach()).findings())


class _Lint:
    """Calls a copy of the critic, each time in the same state and with the same random numbers."""

    def __init__(self, critic: Callable[..., Any], example: Tensor) -> None:
        twin = copied(critic)
        self.is_copy = twin is not None
        self.critic, self.example = (critic, example) if twin is None else _in_float64(twin, example)
        self.modules = [module for _, module in modules_of(self.critic)]
        generator = torch.Generator().manual_seed(0)

        def noise() -> Tensor:
            return torch.randn(example.shape, generator=generator, dtype=torch.float64).to(self.example)

        spread = float(self.example.std()) if self.example.numel() > 1 else 0.0
        self.scale = spread or 1.0
        near = [self.example + 0.1 * self.scale * noise() for _ in range(POINTS - 1)]
        self.points = [self.example, *near]
        self.directions = [noise() for _ in self.points]

    def findings(self) -> Iterator[Finding]:
        scores, n = self._scores(self.example), len(self.example)
        repeats = torch.equal(scores, self._scores(self.example))  # False with a generator of the critic's own
        if repeats:
            yield from self._cut()
        if scores.numel() < n:
            yield _fewer(scores.numel(), n)
        elif repeats and n > 1:
            yield from self._meeting(scores)
        yield from self._repeatable()
        yield from self._float16()

    def _scores(self, x: Tensor) -> Tensor:
        with self._restored():
            return scores_of(self.critic(x.requires_grad_())).detach()

    def _restored(self) -> AbstractContextManager[None]:
        return restored(self.modules, self.example.device)

    # --- the gradient is cut ------------------------------------------------------------------------------------------

    def _cut(self) -> Iterator[Finding]:
        gradients = [self._gradient(x) for x in self.points]
        found = [g for g in gradients if g is not None]
        if len(found) < len(gradients):
            yield _no_gradient(self._changes())
            return
        apart = []
        for x, u, g in zip(self.points, self.directions, found, strict=True):
            slope, rounding = self._slope(x, u)
            by_autograd = float((g * u).sum())
            size = max(abs(slope), abs(by_autograd), float(g.norm()), 1e-300)
            apart.append((abs(slope - by_autograd) - rounding) / size)
        share = median(apart)
        if share < APART:
            return
        blind = torch.stack([g == 0 for g in found]).flatten(0, 1).all(0)  # by element of a sample
        if blind.any() and self._changes(blind):
            yield _blind(int(blind.sum()), blind.numel())
        else:
            yield _wrong(share)

    def _gradient(self, x: Tensor) -> Tensor | None:
        """Return the gradient of the summed scores; None where no graph leads to the input."""
        x = x.detach().requires_grad_()
        with self._restored():
            scores = scores_of(self.critic(x))
            if not scores.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
        return gradient

    def _changes(self, where: Tensor | bool = True) -> bool:
        """Whether the scores change with the input at every point, beyond rounding. where: the elements to vary."""
        slopes = (self._slope(x, u * where) for x, u in zip(self.points, self.directions, strict=True))
        return all(abs(slope) > rounding for slope, rounding in slopes)

    def _slope(self, x: Tensor, direction: Tensor) -> tuple[float, float]:
        """Return the central difference of the summed scores along a direction, and a bound of its rounding error."""
        eps = torch.finfo(x.dtype).eps
        step = eps ** (1 / 3) * self.scale
        ahead, behind = (self._scores(x.detach() + way * step * direction) for way in (1, -1))
        return float((ahead - behind).sum()) / (2 * step), 100 * eps * float(ahead.abs().sum()) / (2 * step)

    # --- samples ------------------------------------------------------------------------------------------------------

    def _meeting(self, scores: Tensor) -> Iterator[Finding]:
        """Check whether the first sample's score changes with the other samples."""
        n, others = len(self.example), self.points[1].detach().clone()
        others[0] = self.example[0].detach()
        first, again = (s.reshape(n, -1)[0] for s in (scores, self._scores(others)))
        rounding = 1e4 * torch.finfo(scores.dtype).eps
        if float((first - again).abs().max()) <= rounding * float(scores.abs().max()):
            return
        try:
            where = explain(self.critic, self.example.detach()).meet
        except ValueError:  # no gradient, which is already reported
            where = ""
        yield _meet(where)

    # --- noise and precision ------------------------------------------------------------------------------------------

    def _repeatable(self) -> Iterator[Finding]:
        modes = [(m, m.training) for module in self.modules for m in module.modules()]
        for module in self.modules:
            module.eval()
        found = []
        try:
            for seed in (1, 2):
                with self._restored():
                    torch.manual_seed(seed)
                    found.append(scores_of(self.critic(self.example)).detach())
        finally:
            for module, mode in modes:
                module.training = mode
        first, second = found
        if not torch.allclose(first, second, rtol=1e-5, atol=1e-8, equal_nan=True):
            yield _unrepeatable(float((first - second).abs().max()), float(first.abs().max()))

    def _float16(self) -> Iterator[Finding]:
        for module in self.modules if self.is_copy else []:
            module.float()
        x = self.example.detach().float().requires_grad_()
        usual, lowered = self._under(x, enabled=False), self._under(x, enabled=True)
        if usual is None or lowered is None:
            return
        (scores, gradient), (low, low_gradient) = usual, lowered
        if scores.isfinite().all() and not low.isfinite().all():
            yield _overflow("scores")
        elif gradient.isfinite().all() and not low_gradient.isfinite().all():
            yield _overflow("input gradients")

    def _under(self, x: Tensor, enabled: bool) -> tuple[Tensor, Tensor] | None:
        """Return scores and gradient, with or without float16 autocast; None where a call has no such kernel."""
        try:
            with self._restored(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about performance
                with torch.autocast(x.device.type, torch.float16, enabled=enabled):
                    scores = scores_of(self.critic(x))
                (gradient,) = torch.autograd.grad(scores.sum(), x)
        except RuntimeError:
            return None
        return scores.detach(), gradient


def copied(critic: Callable[..., Any]) -> nn.Module | None:
    """Return a copy of a module; None for other callables and for modules with non-leaf tensors, as weight_norm has."""
    if not isinstance(critic, nn.Module):
        return None
    try:
        return copy.deepcopy(critic)
    except RuntimeError:
        return None


def _in_float64(critic: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a float64 copy and example, or the arguments where the critic does not run in float64."""
    wide = copy.deepcopy(critic).double()
    try:
        with restored([wide], example.device):
            wide(example.double())
    except Exception:  # an error of the critic's own is raised again by the next call
        return critic, example
    return wide, example.double()


# --- messages ---------------------------------------------------------------------------------------------------------

_CUT = "look for .detach(), .data, torch.no_grad(), .item() or a conversion to NumPy, and move it out of the critic"


def _no_gradient(moved: bool) -> Finding:
    if not moved:
        return Finding(NO_GRADIENT, "the scores do not depend on the input")
    return Finding(NO_GRADIENT, f"the scores change with the input, but autograd has no graph between them: {_CUT}")


def _blind(count: int, size: int) -> Finding:
    return Finding(
        "cut",
        f"the scores change with {count} of the {size} elements of a sample for which autograd gives a gradient of "
        f"exactly zero, so the penalty ignores them: {_CUT}",
    )


def _wrong(share: float) -> Finding:
    return Finding(
        "cut",
        f"autograd's gradient is not the slope of the scores (they differ by {100 * share:.0f} %), so the penalty is "
        f"of another function than the critic: {_CUT}; a custom function's backward may be wrong, too",
    )


def _fewer(count: int, n: int) -> Finding:
    pack = n // count
    if count == 1:
        text = f"there is one score for all {n} samples: return one for each, and take the mean in the loss"
    elif n % count:
        text = f"there are {count} scores for {n} samples: expected one for each, or for packs of one size"
    else:
        text = (
            f"there are {count} scores for {n} samples, so each is that of a pack of {pack}, as in PacGAN and CTGAN: "
            f"pass pack={pack} to the penalty, which then has one eps and one norm for each pack"
        )
    return Finding("fewer scores", text)


def _meet(where: str) -> Finding:
    place = f" (in {where})" if where else ""
    return Finding(
        "samples meet",
        f"a sample's score changes with the other samples of the batch{place}, so the penalty is not on each sample's "
        "own gradient; BatchNorm does this in training mode, LayerNorm, GroupNorm and InstanceNorm do not",
    )


def _unrepeatable(apart: float, size: float) -> Finding:
    return Finding(
        "not repeatable",
        f"two calls on one batch in eval mode give scores that differ by {apart:.2g} (the largest is {size:.2g}): "
        "dropout or noise is active there; pass training=self.training to F.dropout, and add noise only in training",
    )


def _overflow(what: str) -> Finding:
    return Finding(
        "float16",
        f"under float16 autocast the {what} are not finite, as the largest number of float16 is 65504; gpkernels "
        "computes norms and losses in float32, but the critic's own results overflow before: use bfloat16, or disable "
        "autocast in its last layers",
    )
