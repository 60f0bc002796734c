"""instance_noise: x + sigma * scale * noise, drawn per element (Sønderby et al. 2017; DRAGAN's, Kodali et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.ops.checks import check_batch, check_nonnegative
from gpkernels.ops.differentiable import Differentiable, apply
from gpkernels.ops.op import Op
from gpkernels.ops.philox import draw_key, random_elements
from gpkernels.ops.tensors import laid_out, new_like


def instance_noise_reference(x: Tensor, sigma: float, scale: Tensor | None, key: Tensor, gaussian: bool) -> Tensor:
    """x + sigma * scale * xi, xi from N(0, 1) or U[0, 1) per element, scale one number (1 if None)."""
    noise = random_elements(key, x, gaussian) * sigma
    if scale is not None:
        noise = noise * scale.to(noise.dtype)
    return (x + noise).to(x.dtype)


def _instance_noise(x: Tensor, sigma: float, scale: Tensor | None, key: Tensor, gaussian: bool) -> Tensor:
    return instance_noise_reference(laid_out(x)[0], sigma, scale, key, gaussian)


instance_noise_op = Op(
    "instance_noise(Tensor x, float sigma, Tensor? scale, Tensor key, bool gaussian) -> Tensor",
    _instance_noise,
    lambda x, sigma, scale, key, gaussian: new_like(x),
)


class _InstanceNoise(Differentiable):
    @staticmethod
    def forward(x: Tensor, sigma: float, key: Tensor) -> Any:
        return instance_noise_op(x, sigma, None, key, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent, None, None


def add_instance_noise(x: Tensor, sigma: float, *, generator: torch.Generator | None = None) -> Tensor:
    """x + sigma * N(0, 1), drawn per element (Sønderby et al. 2017).

    x: (N, *); sigma >= 0. Returns x's shape and dtype; a seed gives the same noise on every backend up to rounding.
    Differentiable to any order in x. Raises TypeError or ValueError for bad input.
    """
    check_batch("x", x)
    sigma = check_nonnegative("sigma", sigma)
    key = draw_key(x.device, generator)
    noisy: Tensor = NotImplemented if is_compiling() else instance_noise_op.direct(x, sigma, None, key, True)
    return apply(_InstanceNoise, x, sigma, key) if noisy is NotImplemented else noisy
