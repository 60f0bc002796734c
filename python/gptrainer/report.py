"""The results of a run: weights, metrics, pictures and a few lines of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import gpkernels
from gpkernels.arguments import replacing
from gptrainer import plots
from gptrainer.data import DATASETS, POINTS, load_images
from gptrainer.logs import CSV_NAME
from gptrainer.loop import Trainer
from gptrainer.metrics.quality import ImageQuality
from gptrainer.models import sample

TARGETS = {"wgan-gp": 1.0, "ct-gan": 1.0, "dragan": 1.0, "r1": 0.0, "r2": 0.0, "r3gan": 0.0}  # of the gradient norm


def write_report(trainer: Trainer, seconds: float) -> list[str]:
    """Write samples.png, curves.png, metrics.json and generator.safetensors; return a summary, line by line.

    seconds: duration of training since start or resume.
    """
    config, facts = trainer.config, trainer.quality.facts
    quality = trainer.quality_curve
    if quality["step"][-1] != trainer.step:
        last = {"step": trainer.step, **trainer.measure()}
        quality = {name: [*values, last[name]] for name, values in quality.items()}
    start, end = ({name: values[at] for name, values in quality.items() if name != "step"} for at in (0, -1))
    metrics: dict[str, Any] = {
        "config": config.settings(),
        "versions": {"gpkernels": gpkernels.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "steps": trainer.step,
        "quality": {"start": start, "end": end, **facts},
        "curves": {"critic": trainer.critic_curve, "quality": quality},
        "seconds": seconds,
    }
    paths = {
        "samples": trainer.out / "samples.png",
        "curves": trainer.out / "curves.png",
        "numbers": trainer.out / CSV_NAME,
        "metrics": trainer.out / "metrics.json",
        "weights": trainer.out / "generator.safetensors",
    }
    about = {name: str(getattr(config, name)) for name in ("algorithm", "data", "network", "latent", "width", "seed")}
    weights = {name: value.contiguous().cpu() for name, value in trainer.evaluated("generator").state_dict().items()}
    with replacing(paths["weights"]) as part:
        part.write_bytes(save(weights, metadata=about))  # save_file would make a file that only its owner reads
    with replacing(paths["metrics"]) as part:
        part.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    title = f"{config.algorithm} on {config.data}, after {trainer.step:,} generator steps"
    _plot_samples(paths["samples"], title, trainer)
    estimate, target = trainer.system.estimate, TARGETS.get(config.algorithm)
    plots.plot_curves(paths["curves"], title, estimate, trainer.critic_curve, quality, facts, target)
    return [
        *(f"{name:<8} {path}" for name, path in paths.items()),
        *(f"{_words(name)} {start[name]:.4g} -> {end[name]:.4g}" for name in end),
        *(f"({_words(name)} {value:.4g})" for name, value in facts.items()),
    ]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("frechet", "Frechet")


def _plot_samples(path: Path, title: str, trainer: Trainer) -> None:
    config = trainer.config
    random = torch.Generator().manual_seed(config.seed + 1)
    latent = torch.randn(1000, config.latent, generator=random).to(trainer.device)
    generated = sample(trainer.evaluated("generator"), latent).cpu()
    if isinstance(trainer.quality, ImageQuality):
        real_images = load_images(config.data, data_dir=config.data_dir)
        real = real_images[torch.randperm(len(real_images), generator=random)[: len(latent)]]
        classify, labelled = trainer.quality.classifier.classify, trainer.quality.labelled
        classes = (classify(generated), classify(real)) if labelled else None
        low = DATASETS[config.data].scaling.low
        plots.plot_images(path, title, (generated - low) / (1 - low), (real - low) / (1 - low), classes)
        return
    real = POINTS[config.data](1000, random)
    plot = plots.plot_points if generated.shape[1] == 2 else plots.plot_line
    plot(path, title, generated, real, lambda x: sample(trainer.critic, x.to(trainer.device)).cpu())
