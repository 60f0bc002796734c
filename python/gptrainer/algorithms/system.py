"""The base of all systems: a critic and a generator that take steps in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import gpkernels
from gpkernels.optim import RMSprop
from gptrainer.config import TrainConfig
from gptrainer.models import mixes_samples
from gptrainer.processes import Draws
from gptrainer.systems import AdamConfig, R1Config, WGANConfig, WGANGPConfig

Metrics = dict[str, Tensor]  # scalars of a step by name


class Estimate(NamedTuple):
    """Estimate most - slope L of a divergence by a critic's loss L, equal for the best critic and otherwise less.

    most: the value for disjoint distributions, 0 if it is unbounded.
    """

    name: str
    divergence: str
    formula: str
    most: float
    slope: float

    def of(self, adversarial: Tensor) -> Tensor:
        """Estimate the divergence by the adversarial part of the critic's loss."""
        return self.most - self.slope * adversarial


ESTIMATES = {
    # Goodfellow et al. 2014, theorem 1
    "gan": Estimate("js_estimate", "Jensen-Shannon divergence", "log 2 − L/2 (nats)", math.log(2), 0.5),
    # Lim and Ye 2017, theorem 1
    "hinge": Estimate("total_variation_estimate", "total variation", "1 − L/2", 1.0, 0.5),
    # Half of the integral of (p - q)^2 / (p + q)
    "least-squares": Estimate("triangular_estimate", "triangular discrimination, halved", "1 − 2 L", 1.0, 2.0),
    # Jolicoeur-Martineau 2020, theorem 3.1
    "relativistic": Estimate("relativistic_estimate", "relativistic divergence", "log 2 − L (nats)", math.log(2), 1.0),
    # Arjovsky et al. 2017, eq. 2
    "wgan": Estimate("wasserstein_estimate", "Wasserstein distance", "E D(real) − E D(fake)", 0.0, 1.0),
}


GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "saturating": gpkernels.saturating_generator_loss,
    "nonsaturating": gpkernels.nonsaturating_generator_loss,
    "wgan": gpkernels.wgan_generator_loss,
    "least-squares": gpkernels.least_squares_generator_loss,
}


class System:
    """A critic loss and a generator loss, each with its optimiser. Subclasses override what differs."""

    def __init__(self, config: TrainConfig, generator: nn.Module, critic: nn.Module, draws: Draws) -> None:
        self.config, self.generator, self.critic = config, generator, critic
        self.draws, self.processes = draws, draws.processes
        self.critic_loss = self.processes.parallel(self.build_critic_loss(critic))
        self.parallel_generator = self.processes.parallel(generator)
        self.generator_weights = [p for p in generator.parameters() if p.requires_grad]
        self.critic_optimiser, self.generator_optimiser = optimisers(config, critic, generator)
        self.optimisers = {"critic": self.critic_optimiser, "generator": self.generator_optimiser}
        self._rates = {name: optimiser.param_groups[0]["lr"] for name, optimiser in self.optimisers.items()}
        self.stateful: dict[str, Any] = dict(self.optimisers)
        self.estimate = ESTIMATES[config.objective]
        self.begin_step(0)

    def build_critic_loss(self, critic: nn.Module) -> nn.Module:
        """Build the loss of the critic, or of a module that wraps it.

        Whether all samples are one batch is fixed, so that a resumed run repeats its bits.
        """
        return gpkernels.CriticLoss(critic, together=not mixes_samples(critic), **self.config.loss_options())

    def begin_step(self, step: int) -> None:
        """Set what depends on the number of steps already taken."""
        if self.config.decay_steps:
            left = max(0.0, 1 - step / self.config.decay_steps)
            for name, optimiser in self.optimisers.items():
                optimiser.param_groups[0]["lr"] = self._rates[name] * left

    def critic_step(self, real: Tensor, fake: Tensor) -> Metrics:
        """Update the critic once; return its loss before the update and the loss's parts, for ``metrics``."""
        self.critic_optimiser.zero_grad()
        parts = self.critic_parts(self.critic_input(real), self.critic_input(fake))
        parts["loss"].backward()
        self.critic_optimiser.step()
        return parts

    def metrics(self, parts: Metrics) -> Metrics:
        """Metrics of a critic step."""
        terms = {term: parts[term] for term in self.config.terms}
        estimated = {self.estimate.name: self.estimate.of(parts["adversarial"])}
        return estimated | {"critic_loss": parts["loss"].detach()} | terms

    def generator_step(self, latent: Tensor, real: Tensor) -> Metrics:
        """Update the generator once; return its loss before the update. real: the critic's last batch."""
        self.generator_optimiser.zero_grad()
        loss = self.loss_of_generated(self.parallel_generator(latent), real)
        loss.backward(inputs=self.generator_weights)  # and none to the critic
        self.generator_optimiser.step()
        return {"generator_loss": loss.detach()}

    def critic_parts(self, real: Tensor, fake: Tensor) -> Metrics:
        """Compute what the critic minimises, "loss", and without a graph its parts, among them "adversarial"."""
        eps = self.draws.uniform(real) if isinstance(self.config, WGANGPConfig) else None
        return self.critic_loss(real, fake, eps=eps)._asdict()

    def loss_of_generated(self, fake: Tensor, real: Tensor) -> Tensor:
        """Compute what the generator minimises."""
        return GENERATOR_LOSSES[self.config.generator_loss](self.critic(self.critic_input(fake)))

    def critic_input(self, x: Tensor) -> Tensor:
        """Transform a batch into what the critic is given."""
        return x

    def scores(self, x: Tensor) -> Tensor:
        """Score samples, one number each."""
        return self.critic(x)

    def measure(self, critic: nn.Module) -> dict[str, float]:
        """Evaluate the critic, where it is of use by itself."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, except for the networks."""
        return {name: part.state_dict() for name, part in self.stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])


def optimisers(config: TrainConfig, critic: nn.Module, generator: nn.Module) -> tuple[Optimizer, Optimizer]:
    """Build the critic's optimiser and the generator's.

    RMSprop with clipping for WGAN; otherwise Adam, the critic's corrected for a lazy penalty (Karras et al. 2020).
    """
    weights, generator_weights = critic.parameters(), generator.parameters()
    rate, generator_rate = config.lr, config.resolved("generator_lr")
    if isinstance(config, WGANConfig):
        return RMSprop(weights, lr=rate, clip=config.clip), RMSprop(generator_weights, lr=generator_rate)
    assert isinstance(config, AdamConfig)
    lazy = config.lazy if isinstance(config, R1Config) else 1
    share = lazy / (lazy + 1) if lazy > 1 else 1.0
    first, second = config.betas
    return (
        Adam(weights, rate * share, (first**share, second**share), fused=True),
        Adam(generator_weights, generator_rate, config.betas, fused=True),
    )
