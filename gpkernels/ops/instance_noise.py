"""instance_noise: x + sigma * scale * noise (Sønderby et al. 2017; DRAGAN's, Kodali et al. 2017)."""

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
    """Compute x + sigma * scale * xi, xi from N(0, 1) or U[0, 1) per element, scale one number (1 if None)."""
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


instance_noise_op.differentiate(_InstanceNoise, None, (), differentiable=1)


def add_instance_noise(x: Tensor, sigma: float, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Add Gaussian noise to every element of a batch.

    .. math::
        y = x + \sigma \, \xi, \qquad \xi \sim \mathcal{N}(0, 1)

    The noise comes from a Philox counter-based generator, keyed by one number that PyTorch's generator draws: a seed
    gives the same noise on every backend, up to rounding, and for any number of threads. Differentiable to any order in
    ``x``.

    Args:
        x (Tensor): the batch.
        sigma (float): standard deviation of the noise, finite and at least 0.
        generator (torch.Generator, optional): generator of the key. Default: PyTorch's global generator of the device.

    Shape:
        - x: :math:`(N, *)`
        - Output: :math:`(N, *)`

    Returns:
        Tensor: the noisy batch, in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a dense floating-point tensor, ``sigma`` not a number or ``generator`` not a
            ``torch.Generator``.
        ValueError: the batch is empty, or ``sigma`` is negative or not finite.

    Example:
        >>> x = torch.randn(64, 3, 32, 32)
        >>> gpkernels.add_instance_noise(x, 0.1).shape
        torch.Size([64, 3, 32, 32])

    References:
        Sønderby et al., "Amortised MAP Inference for Image Super-resolution", 2017. https://arxiv.org/abs/1610.04490
    """
    check_batch("x", x)
    sigma = check_nonnegative("sigma", sigma)
    key = draw_key(x.device, generator)
    noisy: Tensor = NotImplemented if is_compiling() else instance_noise_op.recorded(x, sigma, None, key, True)
    return apply(_InstanceNoise, x, sigma, key) if noisy is NotImplemented else noisy
