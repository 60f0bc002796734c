"""The training loop of all systems."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gpkernels.arguments import UserError
from gptrainer import logs
from gptrainer.algorithms import build_system
from gptrainer.checkpoint import Checkpoints
from gptrainer.config import FREE_ON_RESUME, TrainConfig, flag
from gptrainer.data import load_batches
from gptrainer.metrics.distances import mean_gradient_norm
from gptrainer.metrics.quality import build_quality
from gptrainer.models import build_models, evaluating, mixes_samples, sample
from gptrainer.processes import ALONE, Draws, Processes, local_device
from gptrainer.stopping import Stopped, check_losses, check_weights, interruptions

BOOST, BOOST_FIRST, BOOST_EVERY = 100, 25, 500  # critic steps, and the generator steps that have as many


class Trainer:
    """A run: networks, optimisers, data and curves, repeatable from a seed.

    critic_curve, quality_curve: lists of equal length by name, one of them "step", in generator steps.
    generator, critic: the networks in training; ``evaluated`` returns those that are measured.
    """

    def __init__(self, config: TrainConfig, processes: Processes = ALONE) -> None:
        """Load the checkpoint if the run is resumed; UserError says what is wrong with it."""
        self.config, self.processes = config, processes
        self.out = config.out
        self.device = local_device(config.device)
        self.checkpoints = Checkpoints(self.out)
        for name in ("batch_size", "generator_batch_size"):
            if (size := config.resolved(name)) % self.processes.size:
                raise UserError(f"{flag(name)}: expected a multiple of the {self.processes.size} processes, got {size}")
        saved = self._load() if config.resume else None
        # Independent streams: networks, noise, dropout (torch's own), data order, measurements.
        torch.manual_seed(config.seed)
        self.generator, self.critic = self._build_networks()
        self.networks = {"critic": self.critic, "generator": self.generator}
        noise_seed, dropout_seed = torch.randint(2**62, (2,)).tolist()
        self.draws = Draws(self.processes, noise_seed, self.device)
        torch.manual_seed(dropout_seed + self.processes.rank)
        self.system = build_system(config, self.generator, self.critic, self.draws)
        self.averages: dict[str, AveragedModel] = {}
        if config.ema:
            mean = get_ema_multi_avg_fn(config.ema)
            self.averages = {name: AveragedModel(net, multi_avg_fn=mean) for name, net in self.networks.items()}
        # The generator is constant between its steps: one pass serves n_critic batches, unless it mixes samples.
        self.batches_a_pass = 1 if mixes_samples(self.generator) else config.n_critic
        options: dict[str, Any] = {"data_dir": config.data_dir, "limit": config.limit, "processes": self.processes}
        self.batches = load_batches(config.data, config.batch_size, config.seed, self.device, **options)
        self.quality = build_quality(config.data, config.latent, config.seed, self.device, data_dir=config.data_dir)
        self.stateful: dict[str, Any] = {**self.networks, "system": self.system, "data": self.batches}
        self.stateful |= {f"average_{name}": average for name, average in self.averages.items()}
        self.step = 0
        self.critic_curve: dict[str, list[float]] = {"step": []}
        self.quality_curve: dict[str, list[float]] = {"step": []}
        if saved is not None:
            self._load_state(saved)
        first = 0 if saved is None else self.step + 1
        self.events = logs.EventLog(self.out, first, config.tensorboard and self.processes.writes)
        if saved is None:
            self._measure_quality()

    def _build_networks(self) -> tuple[nn.Module, nn.Module]:
        """Build (generator, critic) from torch's global generator.

        With several processes BatchNorm is over the rows of all of them, which PyTorch supports on GPUs only.
        """
        config, several = self.config, self.processes.size > 1
        options: dict[str, Any] = {"network": config.network, "batch_norm": config.critic_norm == "batch"}
        built = build_models(config.data, config.latent, config.width, **options)
        if several and self.device.type == "cuda":
            built = tuple(nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in built)
        elif several and any(map(mixes_samples, built)):
            self.processes.say("on a CPU, BatchNorm uses the rows of each process alone, so losses differ from one's")
        generator, critic = built
        return generator.to(self.device), critic.to(self.device)

    def evaluated(self, name: str) -> nn.Module:
        """The network of a name as it is measured: its moving average, where the run has one."""
        return self.averages[name].module if self.averages else self.networks[name]

    def train(self) -> None:
        """Train to the last step. Raises Stopped after Ctrl-C or SIGTERM, with everything saved."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        steps = self.config.steps
        bar = tqdm(
            total=steps,
            initial=self.step,
            desc=f"{self.config.algorithm} on {self.config.data}",
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file should get few lines
            dynamic_ncols=True,
            disable=not self.processes.writes,
        )
        with interruptions() as received, bar:
            while self.step < steps:
                metrics, stop = self._agreed(self.train_step(), stop=bool(received))
                check_losses(metrics, self.step, self.networks)
                if self.step % self.config.log_every == 0:
                    self._log(metrics)
                if self.step % self.config.eval_every == 0:
                    bar.set_postfix(self._measure_quality(), refresh=False)
                bar.update()
                if self.step % self.config.checkpoint_every == 0 or self.step == steps or stop:
                    self.save()
                if stop:
                    raise Stopped(received[0] if received else signal.SIGINT)
        self.events.close()

    def train_step(self) -> dict[str, Tensor]:
        """Take n_critic steps of the critic and one of the generator; return the metrics of the last of each."""
        self.system.begin_step(self.step)
        for real, fake in self.next_batches(self._critic_steps()):
            critic_parts = self.system.critic_step(real, fake)
        self.real, self.fake = real, fake
        latent = self.noise(self.config.resolved("generator_batch_size"))
        metrics = self.system.metrics(critic_parts) | self.system.generator_step(latent, self.real)
        for name, average in self.averages.items():
            average.update_parameters(self.networks[name])
        self.step += 1
        return metrics

    def next_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's rows of batches for the critic: real, and generated without a graph."""
        size = self.config.batch_size
        for first in range(0, count, self.batches_a_pass):
            with torch.no_grad():
                fakes: Tensor = self.generator(self.noise(size * min(self.batches_a_pass, count - first)))
                fakes = fakes.clone()  # some generators give a view of their weights, which are about to change
            for fake in fakes.split(size // self.processes.size):
                yield self.batches.next(), fake

    def noise(self, n: int) -> Tensor:
        """Draw this process's rows of the generator's input, (n, latent)."""
        return self.draws.normal(n, self.config.latent)

    def save(self) -> None:
        """Write the checkpoint and the curves; UserError if a weight is not finite."""
        check_weights(self.networks, self.step)
        state = self.state()
        if self.processes.writes:
            self.checkpoints.save(state)
            logs.write_csv(self.out / logs.CSV_NAME, self.critic_curve, self.quality_curve)
        self.processes.wait()  # whoever resumes the run next reads what was written

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the curves."""
        on_gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "config": self.config.settings(),
            "step": self.step,
            **{name: part.state_dict() for name, part in self.stateful.items()},
            "noise": self.draws.generator.get_state(),
            "rng": self.processes.gather((torch.get_rng_state(), on_gpu)),
            "critic_curve": self.critic_curve,
            "quality_curve": self.quality_curve,
        }

    def _load(self) -> dict[str, Any]:
        saved, note = self.checkpoints.load()
        if note is not None:
            self.processes.say(note)
        before = saved.get("config")
        if not isinstance(before, dict):
            raise self._foreign()
        for name, value in self.config.settings().items():
            if name not in FREE_ON_RESUME and before.get(name) != value:
                option = name.replace("_", "-")
                raise UserError(f"--resume: the run in {self.out} has {option} {before.get(name)}, not {value}")
        return saved

    def _load_state(self, saved: dict[str, Any]) -> None:
        try:
            processes = len(saved["rng"])
            if processes != self.processes.size:
                raise UserError(f"--resume: the run in {self.out} has {processes} processes, not {self.processes.size}")
            self.step = saved["step"]
            self.critic_curve, self.quality_curve = saved["critic_curve"], saved["quality_curve"]
            for name, part in self.stateful.items():
                part.load_state_dict(saved[name])
            self.draws.generator.set_state(saved["noise"])
            random, on_gpu = saved["rng"][self.processes.rank]
            torch.set_rng_state(random)
            if self.device.type == "cuda" and on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu, self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._foreign() from error

    def _foreign(self) -> UserError:
        return UserError(f"--resume: {self.checkpoints.path} does not hold a run of this version")

    def _critic_steps(self) -> int:
        boosted = self.config.critic_boost and (self.step < BOOST_FIRST or self.step % BOOST_EVERY == 0)
        return BOOST if boosted else self.config.n_critic

    def _agreed(self, metrics: dict[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
        """Average metrics over the processes; whether any of them has to stop."""
        values = [value.double() for value in metrics.values()]
        mine = torch.stack([*values, torch.full_like(values[0], float(stop))])
        *means, stops = self.processes.mean(mine).tolist()
        return dict(zip(metrics, means, strict=True)), stops > 0

    def _log(self, metrics: dict[str, float]) -> None:
        points = torch.Generator().manual_seed(self.config.seed + self.step)
        with evaluating(self.critic):
            norm = mean_gradient_norm(self.system.scores, self.real, self.fake, points)
        values = metrics | {"gradient_norm": self.processes.mean(torch.tensor(norm, device=self.device)).item()}
        self._record("critic", self.critic_curve, values)

    def measure(self) -> dict[str, float]:
        """Evaluate sample quality, and the critic where it is of use by itself."""
        return self.quality.measure(self.evaluated("generator")) | self.system.measure(self.evaluated("critic"))

    def _measure_quality(self) -> dict[str, float]:
        if not self.processes.writes:
            return {}
        measured = self.measure()
        self._record("quality", self.quality_curve, measured)
        if self.config.tensorboard:
            self.events.samples(sample(self.evaluated("generator"), self.quality.latent[:1024]), self.step)
        return measured

    def _record(self, group: str, curve: dict[str, list[float]], values: dict[str, float]) -> None:
        for name, value in {"step": self.step, **values}.items():
            curve.setdefault(name, []).append(value)
        self.events.scalars(group, values, self.step)
