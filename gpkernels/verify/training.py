"""Training with our loss and optimiser compared with plain PyTorch, from the same seed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import gpkernels as gpk
from gpkernels.verify.result import Result, distance
from gpkernels.zoo import plain_loss

STEPS, N_CRITIC, BATCH = 200, 5, 64
LR, BETAS = 1e-4, (0.5, 0.9)  # as in the toy code; at ten times that rate training amplifies a rounding to 1e-7


def check_training(backend: str, device: torch.device, steps: int = STEPS) -> Result:
    """Check that WGAN-GP on points in float64 keeps the weights of both networks within 1e-9."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)).double().to(device)
    critic = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    critic = critic.double().to(device)
    twins = copy.deepcopy(generator), copy.deepcopy(critic)
    with gpk.backend(backend):
        _train(generator, critic, steps, device, fused=True)
    _train(*twins, steps, device, fused=False)
    pairs = zip(
        [*generator.parameters(), *critic.parameters()], [*twins[0].parameters(), *twins[1].parameters()], strict=True
    )
    ours, plain = zip(*pairs, strict=True)
    apart = distance(ours, plain)
    where = f"{steps} generator steps, {N_CRITIC} critic steps each"
    return Result(
        "training", "WGAN-GP", backend, "float64", where, apart.absolute <= 1e-9, apart.absolute, apart.relative,
        note="beside plain PyTorch",
    )  # fmt: skip


def _train(generator: nn.Module, critic: nn.Module, steps: int, device: torch.device, fused: bool) -> None:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int, uniform: bool = False) -> Tensor:
        make = torch.rand if uniform else torch.randn
        return make(*shape, generator=random, dtype=torch.float64).to(device)

    optimisers = [torch.optim.Adam(m.parameters(), lr=LR, betas=BETAS) for m in (critic, generator)]
    ours = gpk.CriticLoss(critic)
    for _ in range(steps):
        for _ in range(N_CRITIC):
            real, eps = draw(BATCH, 2) + 2, draw(BATCH, uniform=True)
            with torch.no_grad():
                fake = generator(draw(BATCH, 2))
            loss = ours(real, fake, eps=eps).loss if fused else plain_loss(critic, real, fake, eps)
            _step(optimisers[0], loss, critic)
        scores = critic(generator(draw(BATCH, 2)))
        loss = gpk.wgan_generator_loss(scores) if fused else -scores.mean()
        _step(optimisers[1], loss, generator)


def _step(optimiser: torch.optim.Optimizer, loss: Tensor, model: nn.Module) -> None:
    optimiser.zero_grad()
    loss.backward(inputs=list(model.parameters()))
    optimiser.step()
