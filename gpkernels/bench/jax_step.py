"""WGAN-GP step of an MLP critic in JAX, jitted, where JAX is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.bench.clock import Call


def can_do(critic: nn.Module) -> bool:
    """Whether a critic is Linear layers with ReLU between them."""
    if not isinstance(critic, nn.Sequential) or not isinstance(critic[-1], nn.Linear):
        return False
    return all(isinstance(m, nn.ReLU if i % 2 else nn.Linear) for i, m in enumerate(critic))


def step(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Call:
    """Return a function for the gradients of the critic's loss by its weights. Raises RuntimeError without JAX."""
    if importlib.util.find_spec("jax") is None:
        raise RuntimeError("JAX is not installed")
    with _as_many_cores_as_threads():
        import jax
        import jax.numpy as jnp

        jax.devices()

    linear = [layer for layer in critic.modules() if isinstance(layer, nn.Linear)]
    arrays = [jnp.asarray(x.detach().cpu().numpy()) for x in (real, fake, eps)]
    weights = [
        (jnp.asarray(m.weight.detach().cpu().numpy().T), jnp.asarray(m.bias.detach().cpu().numpy())) for m in linear
    ]

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

    jitted = jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(jitted(weights, *arrays))


@contextmanager
def _as_many_cores_as_threads() -> Iterator[None]:
    """Restrict the cores of this process while XLA starts: its pool has one thread per allowed core."""
    if "jax" in sys.modules or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[: torch.get_num_threads()])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
