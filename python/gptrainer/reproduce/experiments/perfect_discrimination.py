"""Discriminators trained from scratch against fixed generators, and the generators' gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import gpkernels
from gptrainer import plots
from gptrainer.data import load_batches
from gptrainer.metrics.distances import gradient_norms
from gptrainer.models import build_models
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import start, system_of, train

PAPER = "Arjovsky & Bottou 2017"
FIXED = 16  # latent points on which the theorem is checked
LOOKS = 40
BATCHES = 8  # of FIXED points each, over which gradients vary
POWER_STEPS = 25


class World(NamedTuple):
    """A fixed generator in evaluation mode, with real samples and new critics."""

    data: str
    generator: nn.Module
    critic: Callable[[], nn.Module]
    real: Callable[[], Tensor]
    latent: int


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Train a discriminator and a Wasserstein critic from scratch in each world; record the generator's gradients."""
    worlds = [_curves(settings), _clothes(settings, seed, context)]
    found = {world.data: _watch(world, settings, seed) for world in worlds}
    games = [found[world.data]["gan"] for world in worlds]
    critics = [found[world.data]["wgan-gp"] for world in worlds]
    late = max(1, len(games[0]["step"]) // 4)  # of the evaluations, of which all curves have the same number
    return Findings(
        {
            "accuracy": min(_mean(game["accuracy"][-late:]) for game in games),
            "fall": min(_decades(game["saturating"], late) for game in games),
            "log_d": min(_mean(game["log_d"][-late:]) / game["log_d"][0] for game in games),
            "variance": min(_mean(game["variance"][-late:]) / game["variance"][0] for game in games),
            "bound": max(max(game["over_bound"]) for game in games),
            "bound_applies": min(len(game["over_bound"]) / len(game["step"]) for game in games),
            "critic_change": max(abs(_decades(critic["wasserstein"], late)) for critic in critics),
        },
        found,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _decades(values: Sequence[float], late: int) -> float:
    """Decades from the first value down to the geometric mean of the last ones."""
    return math.log10(values[0]) - _mean([math.log10(max(value, 1e-30)) for value in values[-late:]])


def _curves(settings: Settings) -> World:
    """Build a segment and a random curve beside it: disjoint one-dimensional manifolds in the plane."""
    generator = build_models("lines", 1, settings["plane_width"], network="mlp")[0]
    with torch.no_grad():
        list(generator.parameters())[-1][0] = 2.0  # the bias of the first coordinate
    batches = load_batches("lines", settings["batch"], 0, torch.device("cpu"))
    return World(
        "lines", generator, lambda: build_models("lines", 1, settings["plane_width"], network="mlp")[1], batches.next, 1
    )


def _clothes(settings: Settings, seed: int, context: Context) -> World:
    """Load Fashion-MNIST and train a generator on it briefly."""
    values = {"width": settings["width"], "batch_size": settings["batch"]}
    trainer = start("nsgan", "fashion-mnist", settings["pretraining"], seed, context, **values)
    train(trainer, settings["pretraining"], lambda run, losses: None)
    latent = trainer.config.latent or 0
    return World(
        "fashion-mnist",
        trainer.generator.eval(),
        lambda: build_models("fashion-mnist", latent, settings["width"])[1],
        trainer.batches.next,
        latent,
    )


def _watch(world: World, settings: Settings, seed: int) -> dict[str, dict[str, list[float]]]:
    """Record curves of the discriminator and of the Wasserstein critic."""
    latent = torch.randn(FIXED, world.latent)
    norm = jacobian_norm(world.generator, latent)
    curves: dict[str, dict[str, list[float]]] = {}
    for algorithm in ("gan", "wgan-gp"):
        critic = world.critic()
        steps, rate = settings["steps"][algorithm], settings["lr"][algorithm]
        values = {"batch_size": settings["batch"], "lr": rate, "decay_steps": steps + 1}
        system = system_of(algorithm, world.data, world.generator, critic, seed, **values)
        curve: dict[str, list[float]] = {"step": [], "over_bound": []}
        for step in range(steps + 1):
            system.begin_step(step)
            if step % (steps // LOOKS) == 0:
                look = _game if algorithm == "gan" else _wasserstein
                measured = look(world, critic, latent, norm)
                for name, value in ({"step": step} | measured).items():
                    curve.setdefault(name, []).append(value)
            with torch.no_grad():
                fake = world.generator(torch.randn(settings["batch"], world.latent))
            system.critic_step(world.real(), fake)
        curves[algorithm] = curve
    return curves


def _game(world: World, critic: nn.Module, latent: Tensor, norm: float) -> dict[str, Any]:
    weights = list(world.generator.parameters())
    fake = world.generator(latent)
    scores = critic(fake)
    saturating = _gradient(gpkernels.saturating_generator_loss(scores), weights).norm().item()
    others = [
        _gradient(gpkernels.nonsaturating_generator_loss(critic(world.generator(torch.randn_like(latent)))), weights)
        for _ in range(BATCHES)
    ]
    stacked = torch.stack(others)
    with torch.no_grad():
        real = world.real()
        more = critic(world.generator(torch.randn(len(real), world.latent)))
        accuracy = ((critic(real) > 0).double().mean() + (more <= 0).double().mean()).item() / 2
        probability = scores.double().sigmoid().flatten()
    slope = (probability * (1 - probability)) * gradient_norms(critic, fake).double()  # of D, not of its logit
    distance = (probability.max() + slope.max()).item()  # from D* = 0, grad D* = 0 on the generator's manifold
    found = {
        "accuracy": accuracy,
        "saturating": saturating,
        "log_d": stacked.norm(dim=1).mean().item(),
        "variance": stacked.var(dim=0).sum().item(),
    }
    if distance < 1:  # the theorem says nothing of a discriminator further away
        found["over_bound"] = saturating / (norm * distance / (1 - distance))
    return found


def _wasserstein(world: World, critic: nn.Module, latent: Tensor, norm: float) -> dict[str, Any]:
    loss = gpkernels.wgan_generator_loss(critic(world.generator(latent)))
    return {"wasserstein": _gradient(loss, list(world.generator.parameters())).norm().item()}


def _gradient(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])


def jacobian_norm(generator: nn.Module, latent: Tensor) -> float:
    """M, the root of E |J|^2 over the latent points; |J| is the largest singular value of dG(z)/dtheta."""
    weights = {name: weight.detach() for name, weight in generator.named_parameters()}
    total = 0.0
    for z in latent.split(1):
        total += _largest_singular_value(lambda w, z=z: functional_call(generator, w, (z,)), weights) ** 2  # type: ignore[misc]
    return math.sqrt(total / len(latent))


def _largest_singular_value(function: Callable[[dict[str, Tensor]], Tensor], weights: dict[str, Tensor]) -> float:
    """Compute the norm by power iteration on J J^T, which is much smaller than J."""
    value, pull, *_ = vjp(function, weights)
    direction = torch.randn_like(value)
    size = torch.zeros(())
    for _ in range(POWER_STEPS):
        (pulled,) = pull(direction / direction.norm())
        _, direction, *_ = jvp(function, (weights,), (pulled,))
        size = direction.norm()
    return size.sqrt().item()


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    panels: list[pictures.Panel] = []
    for data, name in (("lines", "Disjoint curves"), ("fashion-mnist", "Fashion-MNIST")):
        with pictures.panel(panels, f"{name}: gradients") as ax:
            for algorithm, key, colour, label in (
                ("gan", "saturating", plots.PURPLE, "log(1 − D)"), ("gan", "log_d", plots.ORANGE, "−log D"),
                ("wgan-gp", "wasserstein", plots.BLUE, "Wasserstein critic"),
            ):  # fmt: skip
                for one in findings:
                    curve = one.series[data][algorithm]
                    ax.semilogy(curve["step"], [max(value, 1e-12) for value in curve[key]], color=colour)
                ax.plot([], [], color=colour, label=label)
            ax.set(xlabel="steps of the discriminator, from scratch", ylabel="norm of the gradient")
            ax.legend(frameon=False)
        with pictures.panel(panels, f"{name}: how perfect") as ax:
            for one in findings:
                curve = one.series[data]["gan"]
                ax.plot(curve["step"], curve["accuracy"], color=plots.GREEN)
            pictures.reference(ax, 1.0, "published: 1", at=1.0, below=True)
            ax.set(xlabel="steps of the discriminator, from scratch", ylabel="accuracy", ylim=(0.4, 1.03))
        with pictures.panel(panels, f"{name}: bound and variance") as ax:
            for one in findings:
                curve = one.series[data]["gan"]
                applied = curve["over_bound"]
                ax.semilogy(curve["step"][-len(applied) :], applied, color=plots.PURPLE)
                ax.semilogy(curve["step"], [v / curve["variance"][0] for v in curve["variance"]], color=plots.ORANGE)
            ax.plot([], [], color=plots.PURPLE, label="log(1 − D): gradient over its bound")
            ax.plot([], [], color=plots.ORANGE, label="−log D: variance over that at the start")
            pictures.reference(ax, 1.0, "bound", at=1.0)
            ax.set(xlabel="steps of the discriminator, from scratch", ylabel="ratio")
            ax.legend(frameon=False)
    caption = (
        "Published: the saturating gradient falls by decades while the other grows and gets noisy; a "
        "Wasserstein critic's does neither."
    )
    return Exhibits({"gradients": pictures.Picture(caption, panels)})


EXPERIMENT = Experiment(
    name="perfect-discrimination",
    title="Perfect discrimination: where the generator's gradient goes",
    source=f"{PAPER}, theorems 2.1 and 2.4, figures 2 and 3",
    about=(
        "A discriminator is trained from scratch against a fixed generator: a random curve beside a "
        "segment in the "
        "plane, and a DCGAN trained for a while on Fashion-MNIST. Theorem 2.4 is checked on 16 latent points "
        "wherever it "
        "applies: ε is the largest D plus the largest ‖∇D‖ on them, M² the mean squared norm of the "
        "generator's Jacobian."
    ),
    settings={
        "quick": {
            "plane_width": 64,
            "width": 4,
            "batch": 32,
            "pretraining": 20,
            "steps": {"gan": 160, "wgan-gp": 160},
            "lr": {"gan": 2e-3, "wgan-gp": 1e-3},
        },
        "full": {
            "plane_width": 128,
            "width": 16,
            "batch": 64,
            "pretraining": 300,
            "steps": {"gan": 4000, "wgan-gp": 1600},
            "lr": {"gan": 2e-3, "wgan-gp": 2e-4},
        },
    },
    seeds={"quick": 1, "full": 2},
    measure=measure,
    claims=(
        Claim(
            "The discriminator becomes perfect",
            f"{PAPER}, theorem 2.1",
            "accuracy 1",
            "accuracy",
            "accuracy over the last quarter, lesser of two worlds",
            Bound(at_least=0.99),
            "gradients",
        ),
        Claim(
            "The gradient of log(1 − D) vanishes",
            f"{PAPER}, figure 2",
            "falls by up to 5 decades in 4000 steps",
            "fall",
            "decades, lesser of two worlds",
            Bound(at_least=3),
            "gradients",
            only_full="160 steps are too few for three decades",
        ),
        Claim(
            "The gradient is within the bound of theorem 2.4 at every step",
            f"{PAPER}, theorem 2.4",
            "‖∇‖ < M ε/(1 − ε)",
            "bound",
            "largest gradient over its bound",
            Bound(at_most=1),
            "gradients",
        ),
        Claim(
            "The bound is not vacuous: ε falls below 1",
            f"{PAPER}, theorem 2.4",
            "ε → 0",
            "bound_applies",
            "share of the evaluations at which ε < 1, lesser of two worlds",
            Bound(at_least=0.3),
            "gradients",
        ),
        Claim(
            "The gradient of −log D does not vanish",
            f"{PAPER}, figure 3",
            "grows",
            "log_d",
            "mean norm over the last quarter over that at the start, lesser of two worlds",
            Bound(at_least=0.5),
            "gradients",
        ),
        Claim(
            "The variance of the gradient of −log D grows",
            f"{PAPER}, figure 3 and theorem 2.6",
            "grows fast",
            "variance",
            "variance over batches, last quarter over start, lesser of two worlds",
            Bound(at_least=2),
            "gradients",
        ),
        Claim(
            "A Wasserstein critic's gradient neither vanishes nor explodes",
            "Arjovsky et al. 2017, figure 2",
            "linear: usable at optimality",
            "critic_change",
            "absolute change in decades, greater of two worlds",
            Bound(at_most=1.5),
            "gradients",
        ),
    ),
    exhibit=exhibit,
    needs="Fashion-MNIST",
    limits=(
        "The norm of the Jacobian is found by 25 steps of power iteration, which can underestimate it slightly. The "
        "paper trains its generator for 1, 10 and 25 epochs; here it is 300 steps, a third of one (20 steps in the "
        "quick set). The discriminator's rate falls to 0, so that Adam does not leave the optimum."
    ),
)
