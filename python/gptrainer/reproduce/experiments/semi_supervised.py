"""Few labels and many images: the semi-supervised CT-GAN against its own classifier on the labels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import functional as F

from gptrainer import plots
from gptrainer.loop import Trainer
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import start, train

PAPER = "Wei et al. 2018, section 4.4"


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """Record held-out errors of both during training, with the same labels, networks and steps."""
    both = _with_images(_start(settings, seed, context), settings["steps"] // 12)
    alone = _on_labels_alone(_start(settings, seed, context), settings["steps"] // 12)
    return Findings(
        {"error": both["error"][-1], "ratio": both["error"][-1] / alone["error"][-1]},
        {"both": both, "alone": alone, "labels": settings["labels"]},
    )


def _start(settings: Settings, seed: int, context: Context) -> Trainer:
    values = {"labels_per_class": settings["labels"], "width": settings["width"], "ema": settings["ema"]}
    return start("ssl-ct-gan", "digits", settings["steps"], seed, context, **values)


def _with_images(trainer: Trainer, every: int) -> dict[str, Any]:
    curve: dict[str, Any] = {"step": [], "error": []}
    train(trainer, every, lambda run, losses: _look(run, run.step, curve))
    return curve


def _on_labels_alone(trainer: Trainer, every: int) -> dict[str, Any]:
    """Train the same classifier from the same start by cross-entropy on the same labelled batches."""
    system: Any = trainer.system
    curve: dict[str, Any] = {"step": [], "error": []}
    for step in range(1, trainer.config.steps + 1):
        images, labels = system.labelled_batch()
        system.critic_optimiser.zero_grad()
        F.cross_entropy(trainer.critic(images), labels).backward()
        system.critic_optimiser.step()
        trainer.averages["critic"].update_parameters(trainer.critic)
        if step % every == 0:
            _look(trainer, step, curve)
    return curve


def _look(trainer: Trainer, step: int, curve: dict[str, Any]) -> None:
    curve["step"].append(step)
    curve["error"].append(100 * trainer.system.measure(trainer.evaluated("critic"))["held_out_error"])


def exhibit(findings: Sequence[Findings]) -> Exhibits:
    panels: list[pictures.Panel] = []
    labels = findings[0].series["labels"]
    with pictures.panel(panels, f"Held-out digits, {labels} labels a class", width=6.0) as ax:
        for key, colour, label in (
            ("alone", plots.PURPLE, "labels alone"),
            ("both", plots.BLUE, "semi-supervised CT-GAN"),
        ):
            for one in findings:
                ax.plot(one.series[key]["step"], one.series[key]["error"], color=colour)
            ax.plot([], [], color=colour, label=label)
        pictures.reference(ax, 0.89, "published for MNIST, 100 labels: 0.89 %", at=1.0)
        ax.set(xlabel="steps", ylabel="error (%)", yscale="log")
        ax.legend(frameon=False)
    return Exhibits(
        {
            "errors": pictures.Picture(
                "Each line is a run. The published figure is of another, easier to separate and 40 times larger set.",
                panels,
            )
        }
    )


EXPERIMENT = Experiment(
    name="semi-supervised",
    title="Semi-supervised CT-GAN: images without labels help",
    source=PAPER,
    about=(
        "scikit-learn's 8×8 digits in place of MNIST: a few labelled images of each class, the others "
        "without their labels; 397 are held out."
    ),
    settings={
        "quick": {"steps": 600, "labels": 5, "width": 64, "ema": 0.98},
        "full": {"steps": 4000, "labels": 5, "width": 250, "ema": 0.999},
    },
    seeds={"quick": 1, "full": 2},
    measure=measure,
    claims=(
        Claim(
            "Images without labels lower the error",
            PAPER,
            "0.89 % on MNIST with 100 labels, far below labels alone",
            "ratio",
            "error over that of the same classifier on the labels alone",
            Bound(at_most=0.8, of="the mean"),
            "errors",
            only_full="600 steps are 43 epochs of the paper's 300",
        ),
        Claim(
            "Few labels suffice for a low error",
            PAPER,
            "0.89 % on MNIST with 100 labels",
            "error",
            "error on held-out digits, in per cent, with 50 labels",
            Bound(at_most=20, of="the mean"),
            "errors",
        ),
    ),
    exhibit=exhibit,
    limits=(
        "Digits of 64 pixels, 1,400 to train on: errors are not those of MNIST, whose 60,000 images are not used here."
    ),
)
