"""How steep a critic is, and where its weights lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gpkernels


def gradient_norms(critic: nn.Module, points: Tensor) -> Tensor:
    """|grad D| at each point, (N,). points: (N, *)."""
    points = points.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(points).sum(), points)
    return grad.flatten(1).norm(dim=1)


def mean_gradient_norm(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> float:
    """E |grad D| at points between real and fake."""
    eps = torch.rand(len(real), generator=generator).to(real)
    return gradient_norms(critic, gpkernels.interpolate(real, fake, eps)).mean().item()


def layer_gradient_norms(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """|dL/da| for the output a of each linear layer and convolution, in order, (layers,); L is WGAN's critic loss.

    A norm is over the whole batch [real; fake], as in Gulrajani et al. 2017, fig. 1b.
    """
    outputs: list[Tensor] = []
    layers = [m for m in critic.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    try:
        scores = critic(torch.cat([real, fake]))
    finally:
        for hook in hooks:
            hook.remove()
    loss = gpkernels.wgan_critic_loss(scores[: len(real)], scores[len(real) :])
    return torch.stack([grad.norm() for grad in torch.autograd.grad(loss, outputs)])


def weight_histogram(critic: nn.Module, bins: int = 60, bound: float | None = None) -> tuple[Tensor, Tensor]:
    """(share of the critic's weights in each bin, (bins,); edges, (bins + 1,)), over [-bound, bound].

    bound: by default the largest weight's size. Matrices and kernels count, biases do not.
    """
    weights = _weights(critic)
    bound = bound or weights.abs().max().item()
    counts, edges = torch.histogram(weights.clamp(-bound, bound), bins, range=(-bound, bound))
    return counts / len(weights), edges


def share_at_bound(critic: nn.Module, bound: float) -> float:
    """The share of weights that clipping to [-bound, bound] holds at its ends."""
    weights = _weights(critic)
    return (weights.abs() >= bound * (1 - 1e-4)).double().mean().item()


def _weights(critic: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in critic.parameters() if p.dim() > 1]).float().cpu()
