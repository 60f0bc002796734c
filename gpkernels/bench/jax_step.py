"""JAX's jitted WGAN-GP step of an MLP critic, where JAX is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.bench.clock import Call

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def can_do(critic: nn.Module) -> bool:
    """Linear layers with a ReLU between them."""
    if not isinstance(critic, nn.Sequential) or not isinstance(critic[-1], nn.Linear):
        return False
    return all(isinstance(m, nn.ReLU if i % 2 else nn.Linear) for i, m in enumerate(critic))


def step(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Call:
    """The gradients of the critic's loss in its weights. Raises RuntimeError where JAX is not installed."""
    if importlib.util.find_spec("jax") is None:
        raise RuntimeError("JAX is not installed")
    if torch.get_num_threads() == 1 and "jax" not in sys.modules:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    import jax
    import jax.numpy as jnp

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
