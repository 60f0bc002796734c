"""Suite of attention with its two derivatives, and of a vision transformer's critic step, against the plain form.

Eager PyTorch has a second derivative of attention in its plain form only, which keeps all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import gpkernels as gpk
from gpkernels.bench.cases import Case
from gpkernels.bench.clock import Call
from gpkernels.bench.counts import bare_products
from gpkernels.bench.steps import Step
from gpkernels.bench.trial import EAGER, JVP_FLASH, OURS, Trial
from gpkernels.ops.scaled_dot_product_attention import (
    scaled_dot_product_attention_jvp_op,
    scaled_dot_product_attention_op,
)
from gpkernels.zoo import VisionTransformer, plain_loss

SUITE = "attention"
HEADS, WIDTH = 4, 64
LENGTHS = 256, 1024, 4096
PRODUCTS = 2 + 5 + 12  # of a forward, a backward and a double backward that keep no scores
PRODUCTS_OF_TANGENT = 6  # of a forward with its tangent
CRITICS = {  # pixels, width of a patch, width of a token, batch
    "ViT of 65 tokens, N 16": (32, 4, 64, 16),
    "ViT of 257 tokens, N 4": (32, 2, 64, 4),
    "ViT of 1025 tokens, N 2": (64, 2, 128, 2),
}


def trials(device: torch.device, quick: bool) -> Iterator[Trial]:
    """Yield attention of several lengths, and steps of vision transformers."""
    for length in LENGTHS[: 1 if quick else None]:
        yield attention_trial(f"attention and both derivatives, 1x{HEADS}x{length}x{WIDTH}", length, device)
        yield tangent_trial(f"attention and its tangent, 1x{HEADS}x{length}x{WIDTH}", length, device)
    for name, sizes in list(CRITICS.items())[: 1 if quick else None]:
        yield step_trial(f"{name}, step", *sizes, device)


def growth(device: torch.device) -> Iterator[Trial]:
    """Yield attention over its length."""
    for length in (64, 256, 1024, 2048, 4096):
        yield attention_trial(f"attention, length {length}", length, device, axis="attention: length", size=length)


def attention_trial(case: str, length: int, device: torch.device, **place: Any) -> Trial:
    """Value, gradient, and gradient of the gradient."""
    torch.manual_seed(0)
    shape = 1, HEADS, length, WIDTH
    leaves = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(shape, device=device, requires_grad=True)
    tangents = [torch.randn(shape, device=device) for _ in range(3)]

    def of(function: Callable[..., Tensor]) -> Call:
        def call() -> Any:
            first = torch.autograd.grad(function(*leaves), leaves, cotangent, create_graph=True)
            return torch.autograd.grad(first, [cotangent, *leaves], tangents)

        return call

    calls = {OURS: lambda: of(gpk.scaled_dot_product_attention), EAGER: lambda: of(_plain)}
    return Trial(SUITE, case, calls, lambda: _product(length, device), limit_share=1 / PRODUCTS, **place)


def _product(length: int, device: torch.device) -> Call:
    left, right = (torch.randn(HEADS, length, WIDTH, device=device) for _ in range(2))
    out = torch.empty(HEADS, length, length, device=device)
    return lambda: torch.bmm(left, right.mT, out=out)


def tangent_trial(case: str, length: int, device: torch.device) -> Trial:
    """Value and tangent, as in a push of a critic's tangents; the package jvp_flash_attention has a kernel for both."""
    torch.manual_seed(0)
    shape = 1, HEADS, length, WIDTH
    tensors, tangents = ([torch.randn(shape, device=device) for _ in range(3)] for _ in range(2))
    constants = None, False, WIDTH**-0.5

    def ours() -> Any:
        output, logsumexp = scaled_dot_product_attention_op(*tensors, *constants)
        return output, scaled_dot_product_attention_jvp_op(*tangents, *tensors, output, logsumexp, *constants)[0]

    def dual(function: Callable[..., Tensor]) -> Call:
        def call() -> Any:
            with torch.no_grad(), forward_ad.dual_level():
                value = function(*map(forward_ad.make_dual, tensors, tangents))
                return tuple(forward_ad.unpack_dual(value))

        return call

    def of_jvp_flash_attention() -> Call:
        from jvp_flash_attention.jvp_attention import JVPAttn

        return dual(JVPAttn.fwd_dual)

    calls = {OURS: lambda: ours, EAGER: lambda: dual(_plain), JVP_FLASH: of_jvp_flash_attention}
    return Trial(SUITE, case, calls, lambda: _product(length, device), limit_share=1 / PRODUCTS_OF_TANGENT)


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(query, key, value)


def step_trial(case: str, pixels: int, patch: int, width: int, batch: int, device: torch.device) -> Trial:
    """WGAN-GP step of a critic that calls PyTorch's attention: fused for ours, the plain form for eager's."""
    made = Case(lambda: VisionTransformer(pixels, patch, width, HEADS), (batch, 3, pixels, pixels))
    step = Step.of(made, device)
    loss = gpk.CriticLoss(step.critic)

    def plainly() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return plain_loss(step.critic, step.real, step.fake, step.eps)

    ours = step.gradients(lambda: loss(step.real, step.fake, eps=step.eps).loss)
    calls = {OURS: lambda: ours, EAGER: lambda: step.gradients(plainly)}
    return Trial(SUITE, case, calls, lambda: bare_products(ours))
