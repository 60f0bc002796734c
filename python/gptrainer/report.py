"""What a run leaves behind: weights, numbers, pictures, and a few lines for the person who started it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import gpkernels
from gptrainer import plots
from gptrainer.comparison import Comparison, compare
from gptrainer.config import filled
from gptrainer.data import DATASETS, POINTS, load_images
from gptrainer.files import replacing
from gptrainer.loop import Trainer
from gptrainer.metrics import ImageQuality
from gptrainer.models import sample


def write_report(trainer: Trainer, seconds: float) -> list[str]:
    """Write samples.png, curves.png, metrics.json and generator.safetensors. Returns the closing lines.

    seconds: what training took, from start or resume.
    """
    comparison = compare(trainer.config, trainer.critic, trainer.batches.next(), trainer.fake(_batch(trainer)))
    quality = _quality_to_the_end(trainer)
    start, end = ({name: values[at] for name, values in quality.items() if name != "step"} for at in (0, -1))
    metrics: dict[str, Any] = {
        "config": trainer.config.settings(),
        "versions": {"gpkernels": gpkernels.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "steps": trainer.step,
        "quality": {"start": start, "end": end, **trainer.quality.facts},
        "gradient_difference": comparison.gradient_difference,
        "curves": {"critic": trainer.critic_curve, "quality": quality},
        # All that a second run with the same seed may have otherwise.
        "timing": {"seconds": seconds, "critic_step": asdict(comparison) | {"speedup": comparison.speedup}},
    }
    paths = {
        "samples": trainer.out / "samples.png",
        "curves": trainer.out / "curves.png",
        "metrics": trainer.out / "metrics.json",
        "weights": trainer.out / "generator.safetensors",
    }
    _write_weights(paths["weights"], trainer)
    _write_json(paths["metrics"], metrics)
    _plot_samples(paths["samples"], trainer)
    plots.plot_curves(
        paths["curves"],
        _title(trainer),
        trainer.critic_curve,
        quality,
        trainer.quality.facts,
        target=trainer.config.algorithm == "wgan-gp",
    )
    return [
        *(f"{name:<8} {path}" for name, path in paths.items()),
        _quality_line(trainer, start, end),
        *_comparison_lines(comparison, trainer.device),
    ]


def _quality_to_the_end(trainer: Trainer) -> dict[str, list[float]]:
    """The curve, with a last point where the run ended between two measurements."""
    curve = trainer.quality_curve
    if curve["step"][-1] == trainer.step:
        return curve
    last = {"step": trainer.step, **trainer.quality.measure(trainer.generator)}
    return {name: [*values, last[name]] for name, values in curve.items()}


def _quality_line(trainer: Trainer, start: dict[str, float], end: dict[str, float]) -> str:
    facts = trainer.quality.facts
    if "frechet_distance" in end:
        return (
            f"Frechet distance {start['frechet_distance']:.1f} -> {end['frechet_distance']:.2f}, in the features of a "
            f"classifier with {facts['classifier_held_out_accuracy']:.1%} held-out accuracy "
            f"(two halves of the real digits, 900 each: {facts['frechet_distance_of_real_halves']:.2f})"
        )
    return (
        f"modes covered {start['modes_covered']:.0f} -> {end['modes_covered']:.0f} of 8, "
        f"samples within 4 sigma of a mode {start['share_within_4_sigma']:.1%} -> {end['share_within_4_sigma']:.1%}"
    )


def _comparison_lines(comparison: Comparison, device: torch.device) -> list[str]:
    clock = "CPU time in one thread" if device.type == "cpu" else f"time on {device}"
    return [
        f"critic step {comparison.speedup:.2f}x as fast as plain PyTorch: {comparison.ours_ms:.2f} ms against "
        f"{comparison.plain_ms:.2f} ms ({comparison.what}; {clock})",
        f"largest relative difference of their gradients {comparison.gradient_difference:.1e}",
    ]


def _plot_samples(path: Path, trainer: Trainer) -> None:
    random = torch.Generator().manual_seed(trainer.config.seed + 1)
    latent = torch.randn(1000, filled(trainer.config.latent), generator=random).to(trainer.device)
    generated = sample(trainer.generator, latent).cpu()
    if isinstance(trainer.quality, ImageQuality):
        images = load_images(trainer.config.data)
        real = images[torch.randperm(len(images), generator=random)[: len(latent)]]
        classes = [trainer.quality.classifier.classify(shown) for shown in (generated, real)]
        span = DATASETS[trainer.config.data].range
        plots.plot_images(path, _title(trainer), generated, real, span, (classes[0], classes[1]))
    else:
        plot = plots.plot_points if generated.shape[1] == 2 else plots.plot_line
        plot(
            path, _title(trainer), generated, POINTS[trainer.config.data](1000, random), trainer.critic, trainer.device
        )


def _title(trainer: Trainer) -> str:
    name = {"wgan": "WGAN", "wgan-gp": "WGAN-GP"}[trainer.config.algorithm]
    data = {"digits": "handwritten digits", "8gaussians": "eight Gaussians"}[trainer.config.data]
    return f"{name} on {data}, after {trainer.step:,} generator steps"


def _write_weights(path: Path, trainer: Trainer) -> None:
    weights = {name: value.contiguous().cpu() for name, value in trainer.generator.state_dict().items()}
    about = {name: str(getattr(trainer.config, name)) for name in ("algorithm", "data", "latent", "width", "seed")}
    with replacing(path) as part:
        save_file(weights, part, metadata=about)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _batch(trainer: Trainer) -> int:
    return filled(trainer.config.batch_size)
