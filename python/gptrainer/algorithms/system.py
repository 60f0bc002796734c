"""The base of all systems: a critic and a generator that take steps in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gptrainer.config import TrainConfig
from gptrainer.optimiser import Adam
from gptrainer.parts import mixes_samples
from gptrainer.processes import Draws, Processes
from gptrainer.systems import AdamConfig

Metrics = dict[str, Tensor]
"""Scalars of a step by name, without a graph."""
Optimisers = tuple[torch.optim.Optimizer, torch.optim.Optimizer]
"""The critic's and the generator's."""


class Parts(Protocol):
    """What a critic minimises, and the adversarial part of it; other parts go by the name of their term."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def adversarial(self) -> Tensor: ...


class Setup(NamedTuple):
    """What a system is built from besides its config."""

    generator: nn.Module
    critic: nn.Module
    processes: Processes
    draws: Draws

    @property
    def together(self) -> bool:
        """Whether all samples go through the critic as one batch: fixed, so that a resumed run repeats its bits."""
        return not mixes_samples(self.critic)


class System:
    """A critic loss and a generator loss, each with its optimiser. Subclasses override what differs.

    critic_loss: a module that maps (real, fake) to ``Parts``. generator_loss: of the critic's scores on
    generated samples. terms: parts beyond the adversarial one that get a curve.
    """

    estimate = "js_estimate"
    """Name of the divergence that the critic's loss estimates."""

    def __init__(
        self,
        config: TrainConfig,
        setup: Setup,
        critic_loss: nn.Module,
        generator_loss: Callable[[Tensor], Tensor],
        optimisers: Optimisers,
        terms: tuple[str, ...] = (),
    ) -> None:
        self.generator, self.critic, self.processes, self.draws = setup
        self.critic_loss = setup.processes.parallel(critic_loss)
        self.parallel_generator = setup.processes.parallel(setup.generator)
        self.generator_loss = generator_loss
        self.generator_weights = [p for p in setup.generator.parameters() if p.requires_grad]
        self.critic_optimiser, self.generator_optimiser = optimisers
        self.terms = terms
        self.decay_steps = config.decay_steps
        self._rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]

    def begin_step(self, step: int) -> None:
        """Set what depends on the number of steps already taken."""
        if self.decay_steps:
            left = max(0.0, 1 - step / self.decay_steps)
            for optimiser, rates in zip(self._optimisers().values(), self._rates, strict=True):
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * left

    def critic_step(self, real: Tensor, fake: Tensor) -> Parts:
        """Update the critic once; return the parts of its loss before the update, for ``metrics``."""
        self.critic_optimiser.zero_grad()
        parts = self.critic_parts(self.critic_input(real), self.critic_input(fake))
        parts.loss.backward()
        self.critic_optimiser.step()
        return parts

    def metrics(self, parts: Parts) -> Metrics:
        """Metrics of a critic step."""
        losses = {term: getattr(parts, term) for term in self.terms}
        return {self.estimate: self.estimated(parts.adversarial), "critic_loss": parts.loss.detach(), **losses}

    def generator_step(self, latent: Tensor, real: Tensor) -> Metrics:
        """Update the generator once; return its loss before the update. real: the critic's last batch."""
        self.generator_optimiser.zero_grad()
        loss = self.loss_of_generated(self.parallel_generator(latent), real)
        loss.backward(inputs=self.generator_weights)  # and none to the critic
        self.generator_optimiser.step()
        return {"generator_loss": loss.detach()}

    def critic_parts(self, real: Tensor, fake: Tensor) -> Parts:
        """Compute what the critic minimises."""
        parts: Parts = self.critic_loss(real, fake)
        return parts

    def loss_of_generated(self, fake: Tensor, real: Tensor) -> Tensor:
        """Compute what the generator minimises."""
        return self.generator_loss(self.critic(self.critic_input(fake)))

    def critic_input(self, x: Tensor) -> Tensor:
        """Transform a batch into what the critic is given."""
        return x

    def estimated(self, adversarial: Tensor) -> Tensor:
        """JS >= log 2 - L/2, equal for the best critic (Goodfellow et al. 2014, theorem 1)."""
        return math.log(2) - adversarial / 2

    @property
    def scorer(self) -> nn.Module:
        """A module that maps samples to one score each."""
        return self.critic

    def measure(self, critic: nn.Module) -> dict[str, float]:
        """Evaluate the critic, where it is of use by itself."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, except for the networks."""
        return {name: optimiser.state_dict() for name, optimiser in self._optimisers().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``."""
        for name, optimiser in self._optimisers().items():
            optimiser.load_state_dict(state[name])

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"critic": self.critic_optimiser, "generator": self.generator_optimiser}


class WassersteinSystem(System):
    """A system whose critic estimates the Wasserstein distance."""

    estimate = "wasserstein_estimate"

    def estimated(self, adversarial: Tensor) -> Tensor:
        """E D(real) - E D(fake) (Arjovsky et al. 2017, eq. 2)."""
        return -adversarial


def adam(config: AdamConfig, setup: Setup, lazy: int = 1) -> Optimisers:
    """Adam for both networks, the critic's corrected for a penalty at every lazy-th step only (Karras et al. 2020)."""
    share = lazy / (lazy + 1) if lazy > 1 else 1.0
    first, second = config.betas
    return (
        Adam(setup.critic.parameters(), config.lr * share, (first**share, second**share)),
        Adam(setup.generator.parameters(), config.resolved("generator_lr"), config.betas),
    )
