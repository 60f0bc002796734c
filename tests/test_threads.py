"""Eight threads at once compute what one does; `make test-threads` runs this under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

import gpkernels as gpk
from critics import Odd, mlp
from gpkernels.optim import RMSprop

THREADS, ROUNDS = 8, 6
REAL, FAKE, EPS = torch.linspace(-1, 1, 48).view(8, 6), torch.linspace(2, -1, 48).view(8, 6), torch.linspace(0, 1, 8)


def curved() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))


def convolved() -> nn.Module:
    layers = nn.Conv1d(2, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(4, 1)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), *layers)


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "an MLP": lambda: mlp(6, 8, 1),
    "a curved critic": curved,
    "a convolution": convolved,
    "a call without a rule": Odd,
}
Work = Callable[[nn.Module], Sequence[Tensor]]


def gradients(critic: nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)]


def penalties(critic: nn.Module) -> list[Tensor]:
    loss = gpk.gradient_penalty(critic, REAL, FAKE, eps=EPS) + gpk.r1_penalty(critic, REAL)
    return gradients(critic, loss + gpk.r2_penalty(critic, FAKE) + gpk.eikonal_loss(critic, REAL))


def values(critic: nn.Module) -> list[Tensor]:
    score, slope = gpk.value_and_input_gradient(critic, REAL)
    with torch.no_grad():
        alone = gpk.input_gradient(critic, FAKE)
    return [alone, *gradients(critic, score.square().mean() + gpk.gradient_norm_penalty(slope))]


def composed(critic: nn.Module) -> list[Tensor]:
    with gpk.fast_double_backward():
        penalty = gpk.r1_penalty(critic, REAL)
    first = torch.autograd.grad(penalty, list(critic.parameters()), create_graph=True, allow_unused=True)
    return gradients(critic, torch.stack([g.square().sum() for g in first if g is not None]).sum())


OF_A_CRITIC: dict[str, Work] = {
    "penalties": penalties,
    "input gradients": values,
    "derivatives of PyTorch's operations": composed,
}


def optimised() -> list[Tensor]:
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 70_000)]
    optimizer = RMSprop(weights, lr=1e-2, momentum=0.9, clip=0.5)
    for _ in range(3):
        for w in weights:
            w.grad = w.detach().cos()
        optimizer.step()
    gpk.clip_weights_(weights, 0.2)
    return [w.detach() for w in weights]


def losses() -> list[Tensor]:
    x, y = (torch.linspace(a, b, 1000).requires_grad_() for a, b in ((-3, 2), (4, -1)))
    loss = gpk.wgan_critic_loss(x, y) + gpk.gan_discriminator_loss(x, y) + gpk.relativistic_critic_loss(x, y)
    loss = loss + gpk.hinge_critic_loss(x, y) + gpk.consistency_term(x, y) + gpk.least_squares_critic_loss(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y))]


def large() -> list[Tensor]:
    """Large enough for the threads that PyTorch starts for one operation."""
    x = torch.linspace(-1, 1, 1 << 18).view(64, 4096).requires_grad_()
    mixed = gpk.interpolate(x, x.detach().flip(0), torch.linspace(0, 1, 64))
    noisy = gpk.add_instance_noise(mixed, 0.1, generator=torch.Generator().manual_seed(2))
    penalty = gpk.gradient_norm_penalty(noisy) + gpk.lipschitz_consistency(noisy[:, 0], noisy[:, 1], noisy, mixed)
    return [noisy.detach(), penalty.detach(), *torch.autograd.grad(penalty, x)]


def attended() -> list[Tensor]:
    x = torch.linspace(-2, 2, 2 * 4 * 8 * 16).view(2, 4, 8, 16).requires_grad_()
    out = gpk.scaled_dot_product_attention(x, x.flip(2), x.cos())
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return [out.detach(), *torch.autograd.grad(slope.square().sum(), x)]


OF_TENSORS: dict[str, Callable[[], list[Tensor]]] = {f.__name__: f for f in (optimised, losses, large, attended)}


def assert_all_the_same(works: Sequence[Callable[[], Sequence[Tensor]]]) -> None:
    """Each work in a thread of its own, all at once, gives what it gives alone."""
    exact = [work() for work in works]
    start = Barrier(len(works))

    def many(i: int) -> None:
        start.wait()
        for _ in range(ROUNDS):
            torch.testing.assert_close(works[i](), exact[i])

    with ThreadPoolExecutor(len(works)) as pool:
        assert list(pool.map(many, range(len(works)))) == [None] * len(works)


@pytest.mark.parametrize("shared", [True, False], ids=["of one critic", "of a critic each"])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("name", OF_A_CRITIC)
def test_functions_of_a_critic(name: str, critic: str, shared: bool) -> None:
    one = CRITICS[critic]()
    critics = [one if shared else CRITICS[critic]() for _ in range(THREADS)]
    assert_all_the_same([lambda c=c: OF_A_CRITIC[name](c) for c in critics])  # type: ignore[misc]


@pytest.mark.parametrize("shared", [True, False], ids=["of one loss", "of a loss each"])
@pytest.mark.parametrize("critic", CRITICS)
def test_whole_losses(critic: str, shared: bool) -> None:
    def made() -> gpk.CriticLoss:
        return gpk.CriticLoss(CRITICS[critic](), objective="relativistic", penalty={"r1": 0.5, "r2": 0.5})

    one = made()
    losses = [one if shared else made() for _ in range(THREADS)]
    assert_all_the_same([lambda loss=loss: gradients(loss.critic, loss(REAL, FAKE).loss) for loss in losses])  # type: ignore[misc]


@pytest.mark.parametrize("name", OF_TENSORS)
@pytest.mark.parametrize("inner", [1, 2], ids=["one thread each", "two threads each"])
def test_functions_of_tensors(name: str, inner: int) -> None:
    torch.set_num_threads(inner)
    assert_all_the_same([OF_TENSORS[name]] * THREADS)


RACE = """
import threading, torch, gpkernels
weights, start = torch.ones(1 << 16), threading.Barrier(2)

def clip():
    start.wait()
    for bound in (0.9, 0.8, 0.7, 0.6, 0.5):
        gpkernels.clip_weights_([weights], bound)

threads = [threading.Thread(target=clip) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.skipif("libtsan" not in os.environ.get("LD_PRELOAD", ""), reason="ThreadSanitizer is not loaded")
def test_the_detector_finds_two_threads_that_write_the_same_weights() -> None:
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True)
    assert done.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "csrc/cpu/weights.cpp" in done.stderr
