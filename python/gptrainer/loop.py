"""The training loop of every algorithm: batches in, checkpoints and curves out."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from gptrainer import checkpoint
from gptrainer.algorithms import build_algorithm
from gptrainer.config import FREE_ON_RESUME, TrainConfig, filled
from gptrainer.data import load_batches
from gptrainer.errors import UserError
from gptrainer.metrics import build_quality, mean_gradient_norm
from gptrainer.models import build_models


class Stopped(KeyboardInterrupt):
    """The user stopped a run between two steps; its checkpoint holds all of it."""


class Trainer:
    """A run: networks, optimisers, data and curves, all repeatable from a seed.

    critic_curve, quality_curve: lists of equal length by name, the first of them the generator's steps.
    """

    def __init__(self, config: TrainConfig) -> None:
        """config: complete. Loads the checkpoint if the run is to go on; UserError says what is wrong with it."""
        self.config = config
        self.out = filled(config.out)
        self.device = torch.device(config.device)
        saved = checkpoint.load(self.checkpoint_path) if config.resume else None
        if saved is not None:
            self._check_settings(saved)
        latent, width = filled(config.latent), filled(config.width)
        torch.manual_seed(config.seed)
        # Three streams that do not touch one another: networks and noise (torch's own), data order, measurements.
        self.generator, self.critic = (model.to(self.device) for model in build_models(config.data, latent, width))
        self.algorithm = build_algorithm(config, self.generator, self.critic)
        self.batches = load_batches(config.data, filled(config.batch_size), config.seed, self.device)
        self.quality = build_quality(config.data, latent, config.seed, self.device)
        self.step = 0
        self.critic_curve: dict[str, list[float]] = {"step": [], "wasserstein_estimate": [], "gradient_norm": []}
        self.quality_curve: dict[str, list[float]] = {"step": []}
        if saved is None:
            self._measure_quality()
        else:
            self._load_state(saved)

    @property
    def checkpoint_path(self) -> Path:
        """Where the state of the run is kept."""
        return self.out / checkpoint.NAME

    def train(self) -> None:
        """Steps until the run has as many as its config says. Raises Stopped after Ctrl-C, with all of it saved."""
        steps = filled(self.config.steps)
        label = f"{self.config.algorithm} on {self.config.data}"
        pace = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants few lines
        with (
            interruptions() as interrupted,
            tqdm(total=steps, initial=self.step, desc=label, unit="step", mininterval=pace, dynamic_ncols=True) as bar,
        ):
            while self.step < steps:
                self.train_step()
                if self.step % self.config.eval_every == 0:
                    bar.set_postfix_str(_shown(self._measure_quality()), refresh=False)
                bar.update()
                if self.step % self.config.checkpoint_every == 0 or self.step == steps or interrupted.is_set():
                    self.save()
                if interrupted.is_set():
                    raise Stopped

    def train_step(self) -> None:
        """n_critic steps of the critic and one of the generator."""
        for _ in range(self.config.n_critic):
            real = self.batches.next()
            fake = self.fake(len(real))
            estimate = self.algorithm.critic_step(real, fake)
        self.algorithm.generator_step(self.noise(filled(self.config.batch_size)))
        self.step += 1
        if self.step % self.config.log_every == 0:
            self._log(estimate.item(), real, fake)

    def noise(self, n: int) -> Tensor:
        """The generator's input, (n, latent)."""
        return torch.randn(n, filled(self.config.latent), device=self.device)

    def fake(self, n: int) -> Tensor:
        """A batch for the critic, with no graph to the generator."""
        with torch.no_grad():
            fake: Tensor = self.generator(self.noise(n))
        return fake

    def save(self) -> None:
        """Write the checkpoint."""
        checkpoint.save(self.checkpoint_path, self.state())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, and the curves."""
        return {
            "config": self.config.settings(),
            "step": self.step,
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "generator_optimiser": self.algorithm.generator_optimiser.state_dict(),
            "critic_optimiser": self.algorithm.critic_optimiser.state_dict(),
            "data": self.batches.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "critic_curve": self.critic_curve,
            "quality_curve": self.quality_curve,
        }

    def _load_state(self, saved: dict[str, Any]) -> None:
        try:
            self.step = saved["step"]
            self.critic_curve, self.quality_curve = saved["critic_curve"], saved["quality_curve"]
            self.generator.load_state_dict(saved["generator"])
            self.critic.load_state_dict(saved["critic"])
            self.algorithm.generator_optimiser.load_state_dict(saved["generator_optimiser"])
            self.algorithm.critic_optimiser.load_state_dict(saved["critic_optimiser"])
            self.batches.load_state_dict(saved["data"])
            torch.set_rng_state(saved["rng"])
            if self.device.type == "cuda" and saved["device_rng"] is not None:
                torch.cuda.set_rng_state(saved["device_rng"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--resume: {self.checkpoint_path} does not hold a run of this version") from error

    def _check_settings(self, saved: dict[str, Any]) -> None:
        before, now = saved.get("config"), self.config.settings()
        if not isinstance(before, dict):
            raise UserError(f"--resume: {self.checkpoint_path} does not hold a run of this version")
        for name, value in now.items():
            if name not in FREE_ON_RESUME and before.get(name) != value:
                raise UserError(
                    f"--resume: the run in {self.out} has {name.replace('_', '-')} {before.get(name)}, not {value}"
                )

    def _log(self, estimate: float, real: Tensor, fake: Tensor) -> None:
        if not math.isfinite(estimate):
            raise UserError(f"the critic's estimate became {estimate} at step {self.step}; try a smaller --lr")
        curve = self.critic_curve
        curve["step"].append(self.step)
        curve["wasserstein_estimate"].append(estimate)
        points = torch.Generator().manual_seed(self.config.seed + self.step)
        curve["gradient_norm"].append(mean_gradient_norm(self.critic, real, fake, points))

    def _measure_quality(self) -> dict[str, float]:
        measured = self.quality.measure(self.generator)
        for name, value in {"step": self.step, **measured}.items():
            self.quality_curve.setdefault(name, []).append(value)
        return measured


@contextmanager
def interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step is never cut in two; a second Ctrl-C ends at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield requested
        return
    before = signal.getsignal(signal.SIGINT)

    def stop_after_this_step(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        requested.set()

    signal.signal(signal.SIGINT, stop_after_this_step)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, before)


def _shown(measured: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in measured.items())
