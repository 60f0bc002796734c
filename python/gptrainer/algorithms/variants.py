"""Systems that differ from the base in few lines: noise, steps ahead, consistency, zero-centred penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.optim import Optimizer

import gpkernels
from gpkernels.arguments import UserError
from gptrainer.algorithms.system import Metrics, System
from gptrainer.processes import Draws, Processes
from gptrainer.systems import NoisyGANConfig, R1Config, UnrolledConfig

Weights = dict[str, Tensor]


class NoisyGAN(System):
    """The minimax game on data and samples with added N(0, sigma^2), sigma falling linearly to 0 (Sønderby et al. 2017,
    section 3.2; Arjovsky and Bottou 2017, section 3)."""

    config: NoisyGANConfig

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.sigma = self.config.noise * max(0.0, 1 - step / self.config.resolved("noise_steps"))

    def critic_input(self, x: Tensor) -> Tensor:
        return self.draws.noisy(x, self.sigma)


class CTGAN(System):
    """Wei et al. 2018, as their code trains.

    D' and D'' are two passes over the same real batch, D_ the last feature layer. The penalty and the generator see
    the critic with dropout too. The critic has ``with_features`` (``gptrainer.models.layers``).
    """

    def build_critic_loss(self, critic: nn.Module) -> nn.Module:
        if not hasattr(critic, "with_features"):
            network = self.config.network
            raise UserError(f"--network: expected one with features for {self.config.algorithm}, got {network}")
        return super().build_critic_loss(WithFeatures(critic))


class WithFeatures(nn.Module):
    """A critic that returns (scores, features), as ``CriticLoss`` expects for the consistency term."""

    def __init__(self, critic: Any) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.critic.with_features(x)


class ZeroCentred(System):
    """The non-saturating game with gamma/2 E |grad D|^2 at real (R1) or generated (R2) data (Mescheder et al. 2018,
    eqs. 9 and 10).

    lazy > 1: the penalty at every lazy-th critic step only, times lazy, with the critic's learning rate and betas
    corrected for the fewer terms (Karras et al. 2020, appendix B).
    """

    config: R1Config

    def __init__(self, config: R1Config, generator: nn.Module, critic: nn.Module, draws: Draws) -> None:
        super().__init__(config, generator, critic, draws)
        self.last_penalty = torch.zeros((), device=draws.device)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.critic_steps = step * self.config.n_critic

    def critic_parts(self, real: Tensor, fake: Tensor) -> Metrics:
        """Compute the loss; its penalty is the sum of those of the last step that had any."""
        due = self.critic_steps % self.config.lazy == 0
        self.critic_steps += 1
        parts = self.critic_loss(real, fake, with_penalty=due)._asdict()
        if due:
            self.last_penalty = torch.stack(list(parts["penalty"].values())).sum()
        return parts | {"penalty": self.last_penalty}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last_penalty": self.last_penalty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last_penalty = state["last_penalty"].to(self.draws.device)


class R3GAN(ZeroCentred):
    """Huang et al. 2024, eq. 2 and Algorithm 1: critic and generator of pairs, both penalties."""

    def loss_of_generated(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            real_scores = self.critic(real)
        return gpkernels.relativistic_generator_loss(real_scores, self.critic(fake))


class UnrolledGAN(System):
    """Metz et al. 2017, eqs. 6 to 10: the minimax game against the critic as it would be after k steps on this batch.

    As in their code, the steps ahead are those that the critic's own Adam would take from its present state, and the
    generator maximises the critic's whole loss, in which real samples count too: the critic to come depends on G.
    """

    config: UnrolledConfig

    def loss_of_generated(self, fake: Tensor, real: Tensor) -> Tensor:
        weights = look_ahead(self.critic, self.critic_optimiser, real, fake, self.config.unroll, self.processes)
        return -critic_loss(self.critic, weights, real, fake)


def critic_loss(critic: nn.Module, weights: Weights, real: Tensor, fake: Tensor) -> Tensor:
    """Compute the critic's loss with other weights than its own."""
    real_scores, fake_scores = (functional_call(critic, weights, (x,)) for x in (real, fake))
    return gpkernels.gan_discriminator_loss(real_scores, fake_scores)


def look_ahead(
    critic: nn.Module, optimiser: Optimizer, real: Tensor, fake: Tensor, steps: int, processes: Processes
) -> Weights:
    """Compute the critic's weights after steps of its optimiser on one batch, differentiable in the batch.

    Neither the critic nor the optimiser is modified.
    """
    group = optimiser.param_groups[0]
    first, second = group["betas"]
    weights: Weights = {name: p.detach().requires_grad_() for name, p in critic.named_parameters()}
    state = [optimiser.state.get(p, {}) for p in critic.parameters()]
    means = [s["exp_avg"] if s else p.new_zeros(p.shape) for s, p in zip(state, weights.values(), strict=True)]
    squares = [s["exp_avg_sq"] if s else p.new_zeros(p.shape) for s, p in zip(state, weights.values(), strict=True)]
    taken = int(state[0]["step"]) if state[0] else 0
    for step in range(taken + 1, taken + steps + 1):
        loss = critic_loss(critic, weights, real, fake)
        grads = [processes.mean(g) for g in grad(loss, list(weights.values()), create_graph=True)]
        means = [first * m + (1 - first) * g for m, g in zip(means, grads, strict=True)]
        squares = [second * v + (1 - second) * g * g for v, g in zip(squares, grads, strict=True)]
        weights = {
            name: w - group["lr"] / (1 - first**step) * m / (_root(v / (1 - second**step)) + group["eps"])
            for (name, w), m, v in zip(weights.items(), means, squares, strict=True)
        }
    return weights


def _root(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, where a dead unit's gradients are."""
    positive = x > 0
    return x.where(positive, 1.0).sqrt().where(positive, 0.0)
