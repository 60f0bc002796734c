"""What all systems share: a critic and a generator that take steps in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gptrainer.config import TrainConfig, filled
from gptrainer.optimiser import Adam
from gptrainer.parts import mixes_samples
from gptrainer.processes import Draws, Processes

Told = dict[str, Tensor]
"""Scalars of a step by name, without a graph."""


class Parts(Protocol):
    """What a critic minimises, and the game's share of it; others go by the name of their term."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def adversarial(self) -> Tensor: ...


class Setup(NamedTuple):
    """What a system is built from."""

    config: TrainConfig
    generator: nn.Module
    critic: nn.Module
    processes: Processes
    draws: Draws

    @property
    def together(self) -> bool:
        """Whether all samples go through the critic as one batch: settled, so that a resumed run repeats its bits."""
        return not mixes_samples(self.critic)


class System:
    """A critic loss and a generator loss, each with its optimiser.

    critic_loss: a module that maps (real, fake) to ``Parts``. generator_loss: of the critic's scores on
    generated samples. terms: which parts beyond the adversarial one are worth a curve.
    A system overrides what is different in it.
    """

    estimate = "js_estimate"
    """What the critic's loss estimates: the Jensen-Shannon divergence in nats, or the Wasserstein distance."""

    def __init__(
        self,
        setup: Setup,
        critic_loss: nn.Module,
        generator_loss: Callable[[Tensor], Tensor],
        optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        terms: tuple[str, ...] = (),
    ) -> None:
        """optimisers: the critic's and the generator's."""
        self.config, self.generator, self.critic, self.processes, self.draws = setup
        self.critic_loss = setup.processes.parallel(critic_loss)
        self.parallel_generator = setup.processes.parallel(setup.generator)
        self.generator_loss = generator_loss
        self.generator_weights = [p for p in setup.generator.parameters() if p.requires_grad]
        self.critic_optimiser, self.generator_optimiser = optimisers
        self.terms = terms
        self._rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]

    def begin_step(self, step: int) -> None:
        """Set what depends on how far the run is; step: those already taken."""
        if self.config.decay_steps:
            left = max(0.0, 1 - step / self.config.decay_steps)
            for optimiser, rates in zip(self._optimisers().values(), self._rates, strict=True):
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * left

    def critic_step(self, real: Tensor, fake: Tensor) -> Parts:
        """One update of the critic; the parts of its loss before the update, for ``told``."""
        self.critic_optimiser.zero_grad()
        parts = self.critic_parts(self.shown(real), self.shown(fake))
        parts.loss.backward()
        self.critic_optimiser.step()
        return parts

    def told(self, parts: Parts) -> Told:
        """What a critic step is worth telling of."""
        losses = {term: getattr(parts, term) for term in self.terms}
        return {self.estimate: self.estimated(parts.adversarial), "critic_loss": parts.loss.detach(), **losses}

    def generator_step(self, latent: Tensor, real: Tensor) -> Told:
        """One update of the generator; its loss before the update. real: the critic's last batch."""
        self.generator_optimiser.zero_grad()
        loss = self.loss_of_generated(self.parallel_generator(latent), real)
        loss.backward(inputs=self.generator_weights)  # and none to the critic
        self.generator_optimiser.step()
        return {"generator_loss": loss.detach()}

    def critic_parts(self, real: Tensor, fake: Tensor) -> Parts:
        """What the critic minimises."""
        parts: Parts = self.critic_loss(real, fake)
        return parts

    def loss_of_generated(self, fake: Tensor, real: Tensor) -> Tensor:
        """What the generator minimises."""
        return self.generator_loss(self.critic(self.shown(fake)))

    def shown(self, x: Tensor) -> Tensor:
        """What the critic sees of a batch."""
        return x

    def estimated(self, adversarial: Tensor) -> Tensor:
        """JS >= log 2 - L/2, equal for the best critic (Goodfellow et al. 2014, theorem 1)."""
        return math.log(2) - adversarial / 2

    @property
    def scorer(self) -> nn.Module:
        """What gives a score, however the critic is built."""
        return self.critic

    def measure(self, critic: nn.Module) -> dict[str, float]:
        """What the critic itself is worth, where it is more than a means."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, but for the networks."""
        return {name: optimiser.state_dict() for name, optimiser in self._optimisers().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``."""
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


def adam(setup: Setup) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Adam for both networks, all of a network's weights in one pass."""
    config, betas = setup.config, filled(setup.config.betas)
    return (
        Adam(setup.critic.parameters(), filled(config.lr), betas),
        Adam(setup.generator.parameters(), filled(config.generator_lr), betas),
    )
