"""The training loop of every system: batches in, checkpoints and curves out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from gptrainer import logs, parts
from gptrainer.algorithms import Setup, build_system
from gptrainer.checkpoint import Checkpoints
from gptrainer.config import FREE_ON_RESUME, TrainConfig, filled
from gptrainer.divergence import check_losses, check_weights
from gptrainer.errors import UserError
from gptrainer.interruption import Interruption, Stopped, interruptions
from gptrainer.metrics import mean_gradient_norm
from gptrainer.models import sample
from gptrainer.processes import Draws, Processes, local_device

BOOST, BOOST_FIRST, BOOST_EVERY = 100, 25, 500  # critic steps, and the generator steps that have as many


class Trainer:
    """A run: networks, optimisers, data and curves, all repeatable from a seed.

    critic_curve, quality_curve: lists of equal length by name, one of them "step", the generator's steps.
    generator, critic: the networks in training; ``shown`` gives those that are measured.
    """

    def __init__(self, config: TrainConfig, processes: Processes | None = None) -> None:
        """config: complete. Loads the checkpoint if the run is to go on; UserError says what is wrong with it."""
        self.config = config
        self.processes = processes or Processes()
        self.out = filled(config.out)
        self.device = local_device(config.device)
        self.checkpoints = Checkpoints(self.out)
        saved = self._load() if config.resume else None
        # Streams that do not touch one another: networks, noise, dropout (torch's own), data order, measurements.
        torch.manual_seed(config.seed)
        self.generator, self.critic = parts.networks(config, self.processes, self.device)
        noise_seed, dropout_seed = torch.randint(2**62, (2,)).tolist()
        self.draws = Draws(self.processes, noise_seed, self.device)
        torch.manual_seed(dropout_seed + self.processes.rank)
        self.system = build_system(Setup(config, self.generator, self.critic, self.processes, self.draws))
        self.averages = parts.averages(config, self.networks)
        # The generator stands still between its steps: one pass serves n_critic batches, unless it mixes samples.
        self.batches_a_pass = 1 if parts.mixes_samples(self.generator) else filled(config.n_critic)
        self.batches = parts.batches(config, self.processes, self.device)
        self.quality = parts.quality(config, self.device)
        self.step = 0
        self.critic_curve: dict[str, list[float]] = {"step": []}
        self.quality_curve: dict[str, list[float]] = {"step": []}
        if saved is not None:
            self._load_state(saved)
        first = 0 if saved is None else self.step + 1
        self.events = logs.EventLog(self.out, first, config.tensorboard and self.processes.writes)
        if saved is None:
            self._measure_quality()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Both, by name."""
        return {"critic": self.critic, "generator": self.generator}

    def shown(self, name: str) -> nn.Module:
        """The network by its name as it is measured: the moving average of it, where the run has one."""
        return self.averages[name].module if self.averages else self.networks[name]

    def train(self) -> None:
        """Steps until the run has as many as its config says. Raises Stopped after Ctrl-C, with all of it saved."""
        steps = filled(self.config.steps)
        with interruptions() as interruption, self._progress(steps) as bar:
            while self.step < steps:
                told, stop = self._agreed(self.train_step(), interruption)
                check_losses(told, self.step, self.networks)
                if self.step % self.config.log_every == 0:
                    self._log(told)
                if self.step % self.config.eval_every == 0:
                    bar.set_postfix_str(_shown(self._measure_quality()), refresh=False)
                bar.update()
                if self.step % self.config.checkpoint_every == 0 or self.step == steps or stop:
                    self.save()
                if stop:
                    raise Stopped(interruption.signal)
        self.events.close()

    def train_step(self) -> dict[str, Tensor]:
        """n_critic steps of the critic and one of the generator; the losses of the last of each."""
        self.system.begin_step(self.step)
        for real, fake in self.next_batches(self._critic_steps()):
            minimised = self.system.critic_step(real, fake)
        self.real, self.fake = real, fake
        latent = self.noise(filled(self.config.generator_batch_size))
        told = self.system.told(minimised) | self.system.generator_step(latent, self.real)
        for name, average in self.averages.items():
            average.update_parameters(self.networks[name])
        self.step += 1
        return told

    def next_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of batches for the critic: real, and generated without a graph."""
        size = filled(self.config.batch_size)
        for first in range(0, count, self.batches_a_pass):
            with torch.no_grad():
                fakes: Tensor = self.generator(self.noise(size * min(self.batches_a_pass, count - first)))
                fakes = fakes.clone()  # some generators give a view of their weights, which are about to change
            for fake in fakes.split(size // self.processes.size):
                yield self.batches.next(), fake

    def noise(self, n: int) -> Tensor:
        """This process's share of the generator's input, (n, latent)."""
        return self.draws.normal(n, filled(self.config.latent))

    def save(self) -> None:
        """Write the checkpoint and the curves; UserError instead if the weights are no numbers."""
        check_weights(self.networks, self.step)
        state = self.state()
        if self.processes.writes:
            self.checkpoints.save(state)
            logs.write_csv(self.out / logs.CSV_NAME, self.critic_curve, self.quality_curve)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, and the curves."""
        return {
            "config": self.config.settings(),
            "step": self.step,
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "system": self.system.state_dict(),
            "data": self.batches.state_dict(),
            "noise": self.draws.generator.get_state(),
            "rng": self.processes.gather(self._random_state()),
            "critic_curve": self.critic_curve,
            "quality_curve": self.quality_curve,
        }

    def _load(self) -> dict[str, Any]:
        saved, note = self.checkpoints.load()
        if note is not None:
            self.processes.say(note)
        before, now = saved.get("config"), self.config.settings()
        if not isinstance(before, dict):
            raise UserError(f"--resume: {self.checkpoints.path} does not hold a run of this version")
        for name, value in now.items():
            if name not in FREE_ON_RESUME and before.get(name) != value:
                raise UserError(
                    f"--resume: the run in {self.out} has {name.replace('_', '-')} {before.get(name)}, not {value}"
                )
        return saved

    def _load_state(self, saved: dict[str, Any]) -> None:
        try:
            if len(saved["rng"]) != self.processes.size:
                raise UserError(
                    f"--resume: the run in {self.out} has {len(saved['rng'])} processes, not {self.processes.size}"
                )
            self.step = saved["step"]
            self.critic_curve, self.quality_curve = saved["critic_curve"], saved["quality_curve"]
            self.generator.load_state_dict(saved["generator"])
            self.critic.load_state_dict(saved["critic"])
            for name, average in self.averages.items():
                average.load_state_dict(saved["averages"][name])
            self.system.load_state_dict(saved["system"])
            self.batches.load_state_dict(saved["data"])
            self.draws.generator.set_state(saved["noise"])
            random, on_device = saved["rng"][self.processes.rank]
            torch.set_rng_state(random)
            if self.device.type == "cuda" and on_device is not None:
                torch.cuda.set_rng_state(on_device, self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--resume: {self.checkpoints.path} does not hold a run of this version") from error

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def _critic_steps(self) -> int:
        boosted = self.config.critic_boost and (self.step < BOOST_FIRST or self.step % BOOST_EVERY == 0)
        return BOOST if boosted else filled(self.config.n_critic)

    def _agreed(self, told: dict[str, Tensor], interruption: Interruption) -> tuple[dict[str, float], bool]:
        """Means over the processes, and whether any of them was told to stop."""
        values = [value.double() for value in told.values()]
        mine = torch.stack([*values, torch.full_like(values[0], float(interruption.requested))])
        *means, stop = self.processes.mean(mine).tolist()
        return dict(zip(told, means, strict=True)), stop > 0

    def _log(self, told: dict[str, float]) -> None:
        points = torch.Generator().manual_seed(self.config.seed + self.step)
        with evaluating(self.critic):
            norm = mean_gradient_norm(self.system.scorer, self.real, self.fake, points)
        values = told | {"gradient_norm": self.processes.mean(torch.tensor(norm, device=self.device)).item()}
        logs.append(self.critic_curve, self.step, values)
        self.events.scalars("critic", values, self.step)

    def _measure_quality(self) -> dict[str, float]:
        if not self.processes.writes:
            return {}
        measured = self.quality.measure(self.shown("generator")) | self.system.measure(self.shown("critic"))
        logs.append(self.quality_curve, self.step, measured)
        self.events.scalars("quality", measured, self.step)
        points = torch.Generator().manual_seed(self.config.seed)
        latent = torch.randn(1024, filled(self.config.latent), generator=points).to(self.device)
        self.events.samples(sample(self.shown("generator"), latent), self.step)
        return measured

    def _progress(self, steps: int) -> Any:
        pace = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants few lines
        label = f"{self.config.algorithm} on {self.config.data}"
        return tqdm(
            total=steps,
            initial=self.step,
            desc=label,
            unit="step",
            mininterval=pace,
            dynamic_ncols=True,
            disable=not self.processes.writes,
        )


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _shown(measured: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in measured.items())
