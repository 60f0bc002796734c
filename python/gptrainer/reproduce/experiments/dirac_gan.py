"""The Dirac-GAN: a generator and a discriminator of one parameter each, under the objectives of the paper."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpkernels
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings, Table
from gptrainer.reproduce.pictures_dirac import eigenvalue_picture, phase_picture

PAPER = "Mescheder et al. 2018"
STEP = 0.2
STEPS = 500
CLIP = 1.0
GP_WEIGHT = 0.5
SIGMA = 1.0
NODES = 64
CONVERGED, DIVERGED = 0.1, 3.0  # distance from the equilibrium at the end, over that at the start

Loss = Callable[[Tensor, Tensor], Tensor]  # of theta and psi
ORDERS = ("simultaneous", "alternating")  # of the two players' steps


@dataclass(frozen=True)
class System:
    """critic_loss, generator_loss: of (theta, psi); slope, damping: of the field at ``at``, [[0, a], [-a, -b]]."""

    name: str
    critic_loss: Loss
    generator_loss: Loss
    slope: float
    damping: float
    converges: bool
    at: tuple[float, float] = (0.0, 0.0)
    clip: float = math.inf

    def field_eigenvalues(self) -> list[complex]:
        """Eigenvalues -b/2 ± sqrt(b^2/4 - a^2), of section 2 and theorems 4.1 and 4.3 of the paper."""
        root = cmath.sqrt(self.damping**2 / 4 - self.slope**2)
        return [-self.damping / 2 + root, -self.damping / 2 - root]

    def map_eigenvalues(self, alternating: bool) -> list[complex]:
        """Eigenvalues of one step h: 1 + h lambda; alternating, of determinant 1 - h b and trace 2 - h b - h^2 a^2."""
        if not alternating:
            return [1 + STEP * value for value in self.field_eigenvalues()]
        trace, determinant = 2 - STEP * self.damping - (STEP * self.slope) ** 2, 1 - STEP * self.damping
        root = cmath.sqrt(trace**2 / 4 - determinant)
        return [trace / 2 + root, trace / 2 - root]


def scores(psi: Tensor, x: Tensor) -> Tensor:
    """The discriminator D(x) = psi x."""
    return psi * x


def systems() -> list[System]:
    """Objectives of the paper by gpkernels' ops. The data is a point at 0, the generator one at theta."""
    from scipy.special import ndtri  # the experiment is listed without it

    zero = torch.zeros(1, dtype=torch.float64)
    node = torch.from_numpy(ndtri((torch.arange(NODES, dtype=torch.float64).numpy() + 0.5) / NODES))
    noise = SIGMA * node / node.square().mean().sqrt()  # equally likely nodes with the moments that matter at 0

    def gan(theta: Tensor, psi: Tensor) -> Tensor:
        return gpkernels.gan_discriminator_loss(scores(psi, zero), scores(psi, theta))

    def saturating(theta: Tensor, psi: Tensor) -> Tensor:
        return gpkernels.saturating_generator_loss(scores(psi, theta))

    def nonsaturating(theta: Tensor, psi: Tensor) -> Tensor:
        return gpkernels.nonsaturating_generator_loss(scores(psi, theta))

    def wgan(theta: Tensor, psi: Tensor) -> Tensor:
        return gpkernels.wgan_critic_loss(scores(psi, zero), scores(psi, theta))

    def wgan_generator(theta: Tensor, psi: Tensor) -> Tensor:
        return gpkernels.wgan_generator_loss(scores(psi, theta))

    def wgan_gp(theta: Tensor, psi: Tensor) -> Tensor:
        eps = torch.full((1,), 0.5, dtype=torch.float64)
        return wgan(theta, psi) + GP_WEIGHT * gpkernels.gradient_penalty(lambda x: scores(psi, x), zero, theta, eps=eps)

    def noisy(theta: Tensor, psi: Tensor) -> Tensor:
        return gpkernels.gan_discriminator_loss(scores(psi, noise), scores(psi, theta + noise))

    def noisy_generator(theta: Tensor, psi: Tensor) -> Tensor:
        return gpkernels.saturating_generator_loss(scores(psi, theta + noise))

    def r1(gamma: float) -> Loss:
        return lambda theta, psi: gan(theta, psi) + gamma / 2 * gpkernels.r1_penalty(lambda x: scores(psi, x), zero)

    def r2(gamma: float) -> Loss:
        return lambda theta, psi: gan(theta, psi) + gamma / 2 * gpkernels.r2_penalty(lambda x: scores(psi, x), theta)

    return [
        System("gan", gan, saturating, 0.5, 0.0, False),
        System("nsgan", gan, nonsaturating, 0.5, 0.0, False),
        System("wgan, clipped at 1", wgan, wgan_generator, 1.0, 0.0, False, clip=CLIP),
        System("wgan-gp, weight ½", wgan_gp, wgan_generator, 1.0, 2 * GP_WEIGHT, False, at=(0.0, 1.0)),
        System("instance noise, σ = 1", noisy, noisy_generator, 0.5, SIGMA**2 / 2, True),
        System("R1, γ = 0.3", r1(0.3), saturating, 0.5, 0.3, True),
        System("R1, γ = 1", r1(1.0), saturating, 0.5, 1.0, True),
        System("R2, γ = 1", r2(1.0), saturating, 0.5, 1.0, True),
    ]


def move(system: System, state: Tensor, alternating: bool) -> Tensor:
    """Take one step of gradient descent from (theta, psi), differentiable in both, without clipping."""
    theta, psi = state[:1], state[1:]
    moved = theta + STEP * _down(system.generator_loss, theta, psi, theta)
    seen, own = moved if alternating else theta, psi.view_as(psi)  # psi moved the generator too: not part of its slope
    return torch.cat([moved, psi + STEP * _down(system.critic_loss, seen, own, own)])


def field(system: System, state: Tensor) -> Tensor:
    """Vector field of gradient descent in continuous time, (2,)."""
    return (move(system, state, alternating=False) - state) / STEP


def _down(loss: Loss, theta: Tensor, psi: Tensor, by: Tensor) -> Tensor:
    with gpkernels.fast_double_backward():  # the step is differentiated once more
        (gradient,) = torch.autograd.grad(loss(theta, psi), by, create_graph=True)
    return -gradient


def jacobian_eigenvalues(function: Callable[[Tensor], Tensor], at: tuple[float, float]) -> list[complex]:
    """Compute eigenvalues by autograd, through the gradients of the step."""
    state = torch.tensor(at, dtype=torch.float64)
    matrix: Any = torch.autograd.functional.jacobian(function, state)
    return [complex(value) for value in torch.linalg.eigvals(matrix)]


def trajectory(system: System, start: tuple[float, float], alternating: bool) -> Tensor:
    """Compute a trajectory, (STEPS + 1, 2)."""
    states = [torch.tensor(start, dtype=torch.float64)]
    for _ in range(STEPS):
        state = move(system, states[-1].clone().requires_grad_(), alternating).detach()
        gpkernels.clip_weights_([state[1:]], system.clip if system.clip < math.inf else 1e300)
        states.append(state)
    return torch.stack(states)


def behaviour(path: Tensor) -> str:
    """Classify a trajectory by the largest distance from the equilibrium in its last tenth, over the first."""
    radius = path.norm(dim=1)
    left = (radius[-STEPS // 10 :].max() / radius[0]).item()
    return "converges" if left < CONVERGED else "diverges" if left > DIVERGED else "circles"


def distance(found: Sequence[complex], expected: Sequence[complex]) -> float:
    """Largest difference of two pairs, in the better of both orders."""
    return min(max(abs(f - e) for f, e in zip(found, pair, strict=True)) for pair in (expected, expected[::-1]))


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Compute eigenvalues and trajectories of every system, simultaneous and alternating."""
    rows = [_row(system) for system in systems()]
    clipped, gp, *regularised = rows[2:]
    growth = _growth(systems()[0])
    measures = {
        "field_error": max(row["field_error"] for row in rows),
        "map_error": max(row[order]["error"] for row in rows for order in ORDERS),
        "radius_error": max(
            abs(rows[at][order]["radius"] - published)
            for at, order, published in (
                (0, "simultaneous", 1.00499), (0, "alternating", 1.0), (5, "simultaneous", 0.97468),
                (5, "alternating", 0.96954), (6, "simultaneous", 0.9), (6, "alternating", 0.92702),
            )
        ),
        "growth": growth["simultaneous"],
        "drift": abs(growth["alternating"] - 1),
        "unregularised_at_rest": sum(row[order]["behaviour"] == "converges" for row in rows[:2] for order in ORDERS),
        "wasserstein_at_rest": sum(row[order]["behaviour"] == "converges" for row in (clipped, gp) for order in ORDERS),
        "regularised_at_rest": sum(row[order]["behaviour"] == "converges" for row in regularised for order in ORDERS),
    }  # fmt: skip
    return Findings(measures, {"systems": rows})


def _growth(system: System) -> dict[str, float]:
    """Growth of the distance from the equilibrium along a trajectory that starts close to it."""
    paths = {order: trajectory(system, (1e-3, 1e-3), order == "alternating").norm(dim=1) for order in ORDERS}
    # An orbit is an ellipse: its size is the largest radius of a turn (2 pi / (h / 2) = 63 steps).
    return {order: (path[-64:].max() / path[:64].max()).item() for order, path in paths.items()}


def _row(system: System) -> dict[str, Any]:
    start = (1.0, 1.0)
    found = jacobian_eigenvalues(partial(field, system), system.at)
    row: dict[str, Any] = {
        "name": system.name,
        "converges": system.converges,
        "found": [[value.real, value.imag] for value in found],
        "published": [[value.real, value.imag] for value in system.field_eigenvalues()],
        "field_error": distance(found, system.field_eigenvalues()),
        "field": _grid(system),
    }
    for alternating, order in ((False, "simultaneous"), (True, "alternating")):
        path = trajectory(system, start, alternating)
        values = jacobian_eigenvalues(partial(move, system, alternating=alternating), system.at)
        row[order] = {
            "error": distance(values, system.map_eigenvalues(alternating)),
            "radius": max(abs(value) for value in values),
            "behaviour": behaviour(path),
            "path": path.tolist(),
        }
    return row


def _grid(system: System, n: int = 13, reach: float = 2.4) -> list[list[list[float]]]:
    """Evaluate the field on a grid, (n, n, 2), psi by theta."""
    axis = torch.linspace(-reach, reach, n, dtype=torch.float64)
    return [[field(system, torch.stack([x, y]).requires_grad_()).tolist() for x in axis] for y in axis]


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    rows = findings[0].series["systems"]
    table = Table(
        f"Each system over {STEPS} steps of {STEP} from (1, 1). Eigenvalues of the field at the equilibrium "
        "(for WGAN-GP, whose field jumps there, at ψ = 1); largest modulus of a step's eigenvalues.",
        ("system", "eigenvalues", "formula", "simultaneous", "alternating", "published"),
        [
            (
                row["name"], _complex(row["found"]), _complex(row["published"]),
                *(f"{row[order]['behaviour']}, {row[order]['radius']:.5f}" for order in ORDERS),
                "converges" if row["converges"] else "does not converge",
            )
            for row in rows
        ],
    )  # fmt: skip
    return Exhibits({"eigenvalues": eigenvalue_picture(rows), "phases": phase_picture(rows)}, (table,))


def _complex(pair: Sequence[Sequence[float]]) -> str:
    (a, x), (b, _) = pair
    if abs(x) > 1e-5:
        return f"{a:.4f} ± {abs(x):.4f}i".replace("-", "−")
    return f"{max(a, b):.4f}, {min(a, b):.4f}".replace("-", "−")


EXPERIMENT = Experiment(
    name="dirac-gan",
    title="Dirac-GAN: which objectives converge",
    source=PAPER,
    about=(
        "D(x) = ψx discriminates a data point at 0 from a generated one at θ. The Jacobians of the gradient field "
        "and of one step of gradient descent are taken by autograd through the losses and penalties that training "
        "uses. Instance noise is 64 equally likely values with the variance of the normal distribution."
    ),
    settings={"quick": {}, "full": {}},
    seeds={"quick": 1, "full": 1},
    measure=measure,
    claims=(
        Claim(
            "The field's eigenvalues are those of the formulas",
            f"{PAPER}, section 2, theorems 3.1 and 4.1",
            "±f′(0)i without regularisation; −γ/2 ± √(γ²/4 − f′(0)²) for R1 and R2; "
            "f″(0)σ² ± √(f″(0)²σ⁴ − f′(0)²) for instance noise; −λ ± √(λ² − 1) for WGAN-GP away from ψ = 0 "
            "(derived here)",
            "field_error",
            "largest error of an eigenvalue, 8 systems",
            Bound(at_most=1e-6),
            "eigenvalues",
        ),
        Claim(
            "The eigenvalues of one step, simultaneous or alternating, are those of the formulas",
            f"{PAPER}, lemmas 2.4 and 2.5",
            "1 + hλ; for alternating steps the roots of μ² − (2 − hb − h²a²)μ + 1 − hb",
            "map_error",
            "largest error of an eigenvalue, 16 steps",
            Bound(at_most=1e-6),
            "eigenvalues",
        ),
        Claim(
            "The largest moduli at h = 0.2 are those of the formulas, to five digits",
            f"{PAPER}, lemmas 2.4 and 2.5",
            "1.00499 and 1 for gan, 0.97468 and 0.96954 for γ = 0.3, 0.9 and 0.92702 for γ = 1",
            "radius_error",
            "largest difference",
            Bound(at_most=5.1e-6),
            "eigenvalues",
        ),
        Claim(
            "Simultaneous steps of the plain GAN leave the equilibrium at the rate of their eigenvalue",
            f"{PAPER}, lemma 2.4",
            "1.00499⁵⁰⁰⁻⁶³ = 8.8 times further away between the first turn and the last",
            "growth",
            "factor by which the distance grew",
            Bound(8.6, 9.0),
            "phases",
        ),
        Claim(
            "Alternating steps of the plain GAN circle the equilibrium",
            f"{PAPER}, lemma 2.5",
            "eigenvalues on the unit circle: the radius stays",
            "drift",
            "relative change of the radius over 500 steps",
            Bound(at_most=0.01),
            "phases",
        ),
        Claim(
            "The saturating and the non-saturating GAN do not converge",
            f"{PAPER}, lemma 2.3 and figure 2",
            "no convergence",
            "unregularised_at_rest",
            "of 4 runs, those that converge",
            Bound(at_most=0),
            "phases",
        ),
        Claim(
            "WGAN and WGAN-GP do not converge",
            f"{PAPER}, section 3 and figure 2",
            "no convergence",
            "wasserstein_at_rest",
            "of 4 runs, those that converge",
            Bound(at_most=0),
            "phases",
        ),
        Claim(
            "Instance noise, R1 and R2 converge",
            f"{PAPER}, section 3 and theorem 4.1",
            "local convergence",
            "regularised_at_rest",
            "of 8 runs, those that converge",
            Bound(at_least=8),
            "phases",
        ),
    ),
    exhibit=exhibit,
    limits=(
        "Convergence is judged by the last 50 of 500 steps: at most a tenth of the first distance from the equilibrium "
        "counts as converging, more than three times as diverging, anything between as circling."
    ),
)
