"""The unrolled GAN: the generator's gradient flows through future critic steps."""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.optim import Optimizer

import gpkernels
from gptrainer.algorithms.system import System
from gptrainer.processes import Processes
from gptrainer.systems import UnrolledConfig

Weights = dict[str, Tensor]


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
