"""The results of a run: weights, metrics, pictures and a few lines of text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import gpkernels
from gptrainer import plots
from gptrainer.comparison import Comparison, compare
from gptrainer.data import DATASETS, POINTS, load_images
from gptrainer.files import replacing
from gptrainer.logs import CSV_NAME
from gptrainer.loop import Trainer, evaluating
from gptrainer.metrics import ImageQuality
from gptrainer.models import sample

TARGETS = {"wgan-gp": 1.0, "ct-gan": 1.0, "dragan": 1.0, "r1": 0.0, "r2": 0.0, "r3gan": 0.0}  # of the gradient norm


def write_report(trainer: Trainer, seconds: float) -> list[str]:
    """Write samples.png, curves.png, metrics.json and generator.safetensors; return a summary, line by line.

    seconds: duration of training since start or resume.
    """
    comparison = compare(trainer.config, trainer.critic, *next(trainer.next_batches(1)))
    quality = _quality_to_the_end(trainer)
    start, end = ({name: values[at] for name, values in quality.items() if name != "step"} for at in (0, -1))
    metrics: dict[str, Any] = {
        "config": trainer.config.settings(),
        "versions": {"gpkernels": gpkernels.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "steps": trainer.step,
        "quality": {"start": start, "end": end, **trainer.quality.facts},
        "gradient_difference": comparison.gradient_difference if comparison else None,
        "curves": {"critic": trainer.critic_curve, "quality": quality},
        # All that differs in a second run with the same seed.
        "timing": {"seconds": seconds, "critic_step": _timing(comparison)},
    }
    paths = {
        "samples": trainer.out / "samples.png",
        "curves": trainer.out / "curves.png",
        "numbers": trainer.out / CSV_NAME,
        "metrics": trainer.out / "metrics.json",
        "weights": trainer.out / "generator.safetensors",
    }
    _write_weights(paths["weights"], trainer)
    _write_json(paths["metrics"], metrics)
    _plot_samples(paths["samples"], trainer)
    plots.plot_curves(
        paths["curves"],
        _title(trainer),
        trainer.system.estimate,
        trainer.critic_curve,
        quality,
        trainer.quality.facts,
        target=TARGETS.get(trainer.config.algorithm),
    )
    return [
        *(f"{name:<8} {path}" for name, path in paths.items()),
        *_quality_lines(trainer, start, end),
        *(_comparison_lines(comparison, trainer.device) if comparison else ()),
    ]


def _quality_to_the_end(trainer: Trainer) -> dict[str, list[float]]:
    """The curve of sample quality, extended to the last step."""
    curve = trainer.quality_curve
    if curve["step"][-1] == trainer.step:
        return curve
    last = {"step": trainer.step, **trainer.measure()}
    return {name: [*values, last[name]] for name, values in curve.items()}


def _quality_lines(trainer: Trainer, start: dict[str, float], end: dict[str, float]) -> list[str]:
    """One line for each measure, then reference values in parentheses."""
    measured = [f"{_words(name)} {start[name]:.4g} -> {end[name]:.4g}" for name in end]
    return [*measured, *(f"({_words(name)} {value:.4g})" for name, value in trainer.quality.facts.items())]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("frechet", "Frechet")


def _timing(comparison: Comparison | None) -> dict[str, Any] | None:
    return None if comparison is None else asdict(comparison) | {"speedup": comparison.speedup}


def _comparison_lines(comparison: Comparison, device: torch.device) -> list[str]:
    clock = "CPU time in one thread" if device.type == "cpu" else f"time on {device}"
    return [
        f"critic loss and gradients {comparison.speedup:.2f}x as fast as plain PyTorch: {comparison.ours_ms:.2f} ms "
        f"against {comparison.plain_ms:.2f} ms ({clock})",
        f"largest relative difference of their gradients {comparison.gradient_difference:.1e}",
    ]


def _plot_samples(path: Path, trainer: Trainer) -> None:
    config = trainer.config
    random = torch.Generator().manual_seed(config.seed + 1)
    latent = torch.randn(1000, config.latent, generator=random).to(trainer.device)
    generated = sample(trainer.evaluated("generator"), latent).cpu()
    if isinstance(trainer.quality, ImageQuality):
        real_images = load_images(config.data, data_dir=config.data_dir)
        real = real_images[torch.randperm(len(real_images), generator=random)[: len(latent)]]
        classes = [trainer.quality.classifier.classify(images) for images in (generated, real)]
        span = DATASETS[config.data].range
        plots.plot_images(path, _title(trainer), generated, real, span, (classes[0], classes[1]))
        return
    real = POINTS[config.data](1000, random)
    plot = plots.plot_points if generated.shape[1] == 2 else plots.plot_line
    with evaluating(trainer.critic):
        plot(path, _title(trainer), generated, real, trainer.system.scorer, trainer.device)


def _title(trainer: Trainer) -> str:
    return f"{trainer.config.algorithm} on {trainer.config.data}, after {trainer.step:,} generator steps"


def _write_weights(path: Path, trainer: Trainer) -> None:
    weights = {name: value.contiguous().cpu() for name, value in trainer.evaluated("generator").state_dict().items()}
    names = ("algorithm", "data", "network", "latent", "width", "seed")
    about = {name: str(getattr(trainer.config, name)) for name in names}
    with replacing(path) as part:
        part.write_bytes(save(weights, metadata=about))  # save_file would make a file that only its owner reads


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
