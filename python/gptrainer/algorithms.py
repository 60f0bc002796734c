"""One class an algorithm: how its critic and its generator take a step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

import gpkernels
from gptrainer.config import TrainConfig, filled


class Algorithm(Protocol):
    """What the loop calls; checkpoints see the optimisers."""

    @property
    def critic_optimiser(self) -> torch.optim.Optimizer: ...

    @property
    def generator_optimiser(self) -> torch.optim.Optimizer: ...

    def critic_step(self, real: Tensor, fake: Tensor) -> Tensor:
        """One update of the critic; its estimate of the Wasserstein distance before the update, a scalar."""
        ...

    def generator_step(self, latent: Tensor) -> None:
        """One update of the generator."""
        ...


class WGAN:
    """Arjovsky et al. 2017, Algorithm 1: RMSprop, and weights clipped to [-c, c] after each critic step."""

    def __init__(self, generator: nn.Module, critic: nn.Module, lr: float, clip: float) -> None:
        self.generator, self.critic = generator, critic
        self.critic_optimiser = gpkernels.optim.RMSprop(critic.parameters(), lr=lr, clip=clip)
        self.generator_optimiser = gpkernels.optim.RMSprop(generator.parameters(), lr=lr)

    def critic_step(self, real: Tensor, fake: Tensor) -> Tensor:
        self.critic_optimiser.zero_grad()
        loss = gpkernels.wgan_critic_loss(self.critic(real), self.critic(fake))
        loss.backward()
        self.critic_optimiser.step()
        return -loss.detach()

    def generator_step(self, latent: Tensor) -> None:
        wasserstein_generator_step(self.generator, self.critic, self.generator_optimiser, latent)


class WGANGP:
    """Gulrajani et al. 2017, Algorithm 1: Adam, and the gradient penalty in place of clipping."""

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        lr: float,
        betas: tuple[float, float],
        penalty_weight: float,
    ) -> None:
        self.generator, self.critic = generator, critic
        self.loss = gpkernels.CriticLoss(critic, penalty="wgan-gp", penalty_weight=penalty_weight)
        self.critic_optimiser = torch.optim.Adam(critic.parameters(), lr=lr, betas=betas)
        self.generator_optimiser = torch.optim.Adam(generator.parameters(), lr=lr, betas=betas)

    def critic_step(self, real: Tensor, fake: Tensor) -> Tensor:
        self.critic_optimiser.zero_grad()
        parts = self.loss(real, fake)
        parts.loss.backward()
        self.critic_optimiser.step()
        return -parts.adversarial

    def generator_step(self, latent: Tensor) -> None:
        wasserstein_generator_step(self.generator, self.critic, self.generator_optimiser, latent)


def wasserstein_generator_step(
    generator: nn.Module, critic: nn.Module, optimiser: torch.optim.Optimizer, latent: Tensor
) -> None:
    """One step down -E D(G(z)); the critic's weights need no gradient here, so none is computed."""
    optimiser.zero_grad()
    loss = gpkernels.wgan_generator_loss(critic(generator(latent)))
    loss.backward(inputs=list(generator.parameters()))
    optimiser.step()


def build_algorithm(config: TrainConfig, generator: nn.Module, critic: nn.Module) -> Algorithm:
    """The algorithm that a run names."""
    if config.algorithm == "wgan":
        return WGAN(generator, critic, filled(config.lr), config.clip)
    return WGANGP(generator, critic, filled(config.lr), filled(config.betas), filled(config.penalty_weight))
