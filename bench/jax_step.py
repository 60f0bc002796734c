"""The MLP critic steps of critic_step.py beside JAX's jitted step: CPU time of the process, interleaved, minimum of N.

python bench/jax_step.py [--rounds N]        # needs jax; XLA is kept to one thread
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import torch
from torch import nn

import gpkernels as gpk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from critics import mlp, plain_loss

SIZES = {"MLP 2-64x3-1, N 64": (64, 64), "MLP 2-128x3-1, N 256": (128, 256), "MLP 2-512x3-1, N 256": (512, 256)}


def jax_step(critic: nn.Sequential) -> tuple[Callable[..., Any], list[tuple[Any, Any]]]:
    """The jitted gradient of the WGAN-GP critic loss, and the critic's weights."""
    linear = [layer for layer in critic if isinstance(layer, nn.Linear)]
    weights = [(jnp.asarray(m.weight.detach().numpy().T), jnp.asarray(m.bias.detach().numpy())) for m in linear]

    def score(weights: Any, x: Any) -> Any:
        for w, b in weights[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = weights[-1]
        return (x @ w + b)[..., 0]

    def loss(weights: Any, real: Any, fake: Any, eps: Any) -> Any:
        points = eps[:, None] * real + (1 - eps[:, None]) * fake
        gradient = jax.grad(lambda x: score(weights, x).sum())(points)
        penalty = jnp.mean((jnp.sqrt((gradient**2).sum(1)) - 1) ** 2)
        return score(weights, fake).mean() - score(weights, real).mean() + 10 * penalty

    return jax.jit(jax.grad(loss)), weights


def measure(name: str, width: int, n: int, rounds: int) -> str:
    torch.manual_seed(0)
    critic = mlp(2, width, width, width, 1)
    real, fake, eps = torch.randn(n, 2), torch.randn(n, 2), torch.rand(n)
    loss, params = gpk.CriticLoss(critic), list(critic.parameters())
    step, weights = jax_step(critic)
    arrays = [jnp.asarray(x.numpy()) for x in (real, fake, eps)]
    calls: dict[str, Callable[[], Any]] = {
        "gpkernels": lambda: torch.autograd.grad(loss(real, fake, eps=eps).loss, params),
        "eager": lambda: torch.autograd.grad(plain_loss(critic, real, fake, eps), params),
        "jax": lambda: jax.block_until_ready(step(weights, *arrays)),
    }
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.process_time()
            call()
            best[key] = min(best[key], time.process_time() - start)
    difference = abs(jnp.asarray(calls["gpkernels"]()[0].numpy()).T - calls["jax"]()[0][0]).max()
    row = ", ".join(f"{key} {1e3 * value:.3f}" for key, value in best.items())
    return f"{name:24s} {row}; jax over ours {best['jax'] / best['gpkernels']:.2f}, largest difference {difference:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, jax {jax.__version__}; a critic step, milliseconds")
    for name, (width, n) in SIZES.items():
        print(measure(name, width, n, rounds), flush=True)


if __name__ == "__main__":
    main()
