"""Few labels and many images: the semi-supervised CT-GAN against its own classifier on the labels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from gptrainer import plots
from gptrainer.labels import LabelledBatches, error_rate, split
from gptrainer.loop import Trainer
from gptrainer.reproduce import pictures
from gptrainer.reproduce.experiment import Bound, Claim, Context, Exhibits, Experiment, Findings, Settings
from gptrainer.reproduce.training import start, train

PAPER = "Wei et al. 2018, section 4.4"


def measure(settings: Settings, seed: int, context: Context) -> Findings:
    """The error on held-out digits of both, along training, with the same labels, networks and steps."""
    trainer = start(
        "ssl-ct-gan",
        "digits",
        settings["steps"],
        seed,
        context,
        labels_per_class=settings["labels"],
        width=settings["width"],
    )
    alone = start(
        "ssl-ct-gan",
        "digits",
        settings["steps"],
        seed,
        context,
        labels_per_class=settings["labels"],
        width=settings["width"],
    )
    every = settings["steps"] // 12
    both: dict[str, Any] = {"step": [], "error": []}

    def look(run: Trainer, told: dict[str, float]) -> None:
        both["step"].append(run.step)
        both["error"].append(100 * run.system.measure(run.shown("critic"))["held_out_error"])

    train(trainer, every, look)
    labelled = _on_labels_alone(alone, settings, seed, every)
    return Findings(
        {
            "error": both["error"][-1],
            "alone": labelled["error"][-1],
            "ratio": both["error"][-1] / labelled["error"][-1],
        },
        {"both": both, "alone": labelled, "labels": settings["labels"]},
    )


def _on_labels_alone(trainer: Trainer, settings: Settings, seed: int, every: int) -> dict[str, Any]:
    """The same classifier from the same start, by cross-entropy."""
    train_set, held_out = split("digits", seed)
    batches = LabelledBatches(train_set, settings["labels"], trainer.config.batch_size or 0, seed, trainer.device)
    optimiser = torch.optim.Adam(trainer.critic.parameters(), lr=trainer.config.lr or 0.0, betas=(0.5, 0.999))
    curve: dict[str, Any] = {"step": [], "error": []}
    for step in range(1, settings["steps"] + 1):
        images, labels = batches.next()
        optimiser.zero_grad()
        F.cross_entropy(trainer.critic(images), labels).backward()
        optimiser.step()
        trainer.averages["critic"].update_parameters(trainer.critic)
        if step % every == 0:
            curve["step"].append(step)
            curve["error"].append(100 * error_rate(trainer.shown("critic"), held_out, trainer.device))
    return curve


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
        "without their labels; a fifth is held out."
    ),
    settings={
        "quick": {"steps": 360, "labels": 5, "width": 64},
        "full": {"steps": 6000, "labels": 5, "width": 250},
    },
    seeds={"quick": 1, "full": 3},
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
            only_full="360 steps are 25 epochs of the paper's 300",
        ),
        Claim(
            "Few labels are enough to be right most of the time",
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
        "Digits of 64 pixels, 1,437 to train on: errors are not those of MNIST, whose 60,000 images are not used here."
    ),
)
