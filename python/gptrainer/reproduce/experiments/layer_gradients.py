"""Gradient norms and weights of critics of 12 layers: clipping against the penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gpkernels
from gptrainer import plots
from gptrainer.data import SampledBatches
from gptrainer.data.points import swiss_roll
from gptrainer.models import build_models
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import system_of

FIGURE = "Gulrajani et al. 2017, figure 1b"
CLIPS = (0.1, 0.01, 0.001)
SMALLEST = 1e-45  # of float32: what underflows is shown there


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Train a critic for each clipping bound and one under the penalty, on the Swiss roll and the roll plus noise."""
    runs = {f"c = {clip:g}": _train(settings, seed, "wgan", clip=clip) for clip in CLIPS}
    runs["penalty"] = _train(settings, seed, "wgan-gp")
    rise = {name: run["norms"][0] - run["norms"][-1] for name, run in runs.items()}
    return Findings(
        {
            "rise_of_tenth": rise["c = 0.1"],
            "rise_of_hundredth": rise["c = 0.01"],
            "rise_of_thousandth": rise["c = 0.001"],
            "rise_of_penalty": abs(rise["penalty"]),
            "at_bound": runs["c = 0.01"]["at_bound"],
            "penalty_outermost": runs["penalty"]["outermost"],
        },
        {"runs": runs},
    )


def _train(settings: Settings, seed: int, algorithm: str, **values: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator, critic = build_models("swissroll", 2, settings["width"], network="mlp12")
    system = system_of(algorithm, "swissroll", generator, critic, seed, **values)
    batches = SampledBatches(swiss_roll, settings["batch"], seed, torch.device("cpu"))
    for _ in range(settings["steps"]):
        real = batches.next()
        system.critic_step(real, real + torch.randn_like(real))
    real = batches.next()
    norms = layer_gradient_norms(critic, real, real + torch.randn_like(real)).clamp(min=SMALLEST)
    bound = values.get("clip")
    shares, edges = weight_histogram(critic, bins=50, bound=bound)
    return {
        "norms": norms.double().log10().tolist(),
        "at_bound": share_at_bound(critic, bound) if bound else 0.0,
        "outermost": (shares[0] + shares[-1]).item(),
        "shares": shares.tolist(),
        "edges": edges.tolist(),
    }


def layer_gradient_norms(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """|dL/da| for the output a of each linear layer and convolution, in order, (layers,); L is WGAN's critic loss.

    A norm is over the whole batch [real; fake], as in Gulrajani et al. 2017, fig. 1b.
    """
    outputs: list[Tensor] = []
    layers = [m for m in critic.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    try:
        scores = critic(torch.cat([real, fake]))
    finally:
        for hook in hooks:
            hook.remove()
    loss = gpkernels.wgan_critic_loss(scores[: len(real)], scores[len(real) :])
    return torch.stack([grad.norm() for grad in torch.autograd.grad(loss, outputs)])


def weight_histogram(critic: nn.Module, bins: int = 60, bound: float | None = None) -> tuple[Tensor, Tensor]:
    """Shares of the critic's weights in each bin, (bins,), and edges, (bins + 1,), over [-bound, bound].

    bound: by default the largest absolute weight. Biases do not count.
    """
    weights = _weights(critic)
    bound = bound or weights.abs().max().item()
    counts, edges = torch.histogram(weights.clamp(-bound, bound), bins, range=(-bound, bound))
    return counts / len(weights), edges


def share_at_bound(critic: nn.Module, bound: float) -> float:
    """Share of the weights that clipping to [-bound, bound] keeps at the ends."""
    weights = _weights(critic)
    return (weights.abs() >= bound * (1 - 1e-4)).double().mean().item()


def _weights(critic: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in critic.parameters() if p.dim() > 1]).float().cpu()


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    panels: list[pictures.Panel] = []
    names = list(findings[0].series["runs"])
    with pictures.panel(panels, "Gradient norms, layer by layer", height=3.9) as ax:
        for colour, name in zip((plots.PURPLE, plots.ORANGE, plots.GREEN, plots.BLUE), names, strict=True):
            for one in findings:
                norms = one.series["runs"][name]["norms"]
                ax.plot(range(1, len(norms) + 1), norms, "o-", markersize=3, color=colour)
            ax.plot([], [], "o-", markersize=3, color=colour, label=name)
        ax.axhline(0, color=plots.INK, linewidth=1, dashes=(4, 3))
        ax.set(xlabel="layer, from the input", ylabel=r"$\log_{10}$ of $\|\partial L / \partial a\|$", ylim=(-25, 8))
        ax.annotate("published: level under the penalty only", (1, 0.4), fontsize=9)
        ax.legend(frameon=False, loc="lower right")
    for name, colour in (("c = 0.01", plots.ORANGE), ("penalty", plots.BLUE)):
        run = findings[0].series["runs"][name]
        with pictures.panel(panels, f"Weights, {name}", height=3.9) as ax:
            edges = run["edges"]
            ax.bar(
                edges[:-1],
                [100 * share for share in run["shares"]],
                width=edges[1] - edges[0],
                align="edge",
                color=colour,
            )
            ax.set(xlabel="weight", ylabel="share of the weights (%)")
    caption = (
        "Published: gradients explode at c = 0.1, vanish at 0.01 and 0.001 and stay level under the penalty; "
        "clipping drives weights to the two ends of their range."
    )
    return Exhibits({"layers": pictures.Picture(caption, panels)})


EXPERIMENT = Experiment(
    name="layer-gradients",
    title="Gradients through twelve layers: clipping explodes or vanishes",
    source=FIGURE,
    about=(
        "Critics of 12 hidden ReLU layers discriminate the Swiss roll from the roll plus N(0, 1), trained by WGAN with "
        "three clipping bounds and by WGAN-GP; then the norm of the loss's gradient at the output of each layer."
    ),
    settings={
        "quick": {"width": 64, "steps": 40, "batch": 64},
        "full": {"width": 512, "steps": 300, "batch": 256},
    },
    seeds={"quick": 1, "full": 2},
    measure=measure,
    claims=(
        Claim(
            "With c = 0.1 gradients explode on their way to the input",
            FIGURE,
            "grow by orders of magnitude",
            "rise_of_tenth",
            "decades from the last layer to the first",
            Bound(at_least=2),
            "layers",
            only_full="at width 64 weights of 0.1 are too small to explode; the figure's width is 512",
        ),
        Claim(
            "With c = 0.01 gradients vanish on their way to the input",
            FIGURE,
            "fall by orders of magnitude",
            "rise_of_hundredth",
            "decades from the last layer to the first",
            Bound(at_most=-5),
            "layers",
        ),
        Claim(
            "With c = 0.001 gradients vanish faster still",
            FIGURE,
            "fall by more",
            "rise_of_thousandth",
            "decades from the last layer to the first (float32 ends at −45)",
            Bound(at_most=-15),
            "layers",
        ),
        Claim(
            "Under the gradient penalty the norms stay level",
            FIGURE,
            "level",
            "rise_of_penalty",
            "absolute difference of the first and last layer, in decades",
            Bound(at_most=1.5),
            "layers",
        ),
        Claim(
            "Clipping drives the weights to ±c",
            FIGURE,
            "two peaks at the ends",
            "at_bound",
            "share of the weights at ±0.01",
            Bound(at_least=0.5),
            "layers",
        ),
        Claim(
            "The penalty leaves few weights at the ends of their range",
            FIGURE,
            "one broad peak",
            "penalty_outermost",
            "share of the weights in the outermost of 50 bins",
            Bound(at_most=0.05),
            "layers",
        ),
    ),
    exhibit=exhibit,
    limits="The paper does not state how long its critics were trained; here it is 500 steps (40 in the quick set).",
)
