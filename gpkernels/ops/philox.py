"""Philox random numbers: one key gives the same numbers on every backend and for any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.ops.checks import check_generator
from gpkernels.ops.tensors import accumulation_dtype

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox(key: Tensor, counter: Tensor) -> list[Tensor]:
    """Compute Philox-4x32-10 (Salmon et al. 2011): four 32-bit words, held in int64, per counter.

    ``key`` is one int64, split into two words; ``counter`` (n,) fills the two low words of the 128-bit counter.
    """
    words = [counter & _MASK32, (counter >> 32) & _MASK32, torch.zeros_like(counter), torch.zeros_like(counter)]
    round_key = [key & _MASK32, (key >> 32) & _MASK32]
    for _ in range(10):
        # Signed 64-bit products wrap to the bits of the unsigned product.
        first, second = words[0] * _PHILOX_MULTIPLIERS[0], words[2] * _PHILOX_MULTIPLIERS[1]
        words = [
            ((second >> 32) & _MASK32) ^ words[1] ^ round_key[0],
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ words[3] ^ round_key[1],
            first & _MASK32,
        ]
        round_key = [(k + inc) & _MASK32 for k, inc in zip(round_key, _PHILOX_INCREMENTS, strict=True)]
    return words


def unit_interval(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert 24 random bits to a number in [0, 1)."""
    return (word >> 8).to(dtype) * 2.0**-24


def random_elements(key: Tensor, x: Tensor, gaussian: bool) -> Tensor:
    """Generate one random number per element, in memory order, four per Philox call."""
    dtype = accumulation_dtype(x.dtype)
    words = philox(key, torch.arange((x.numel() + 3) // 4, dtype=torch.int64, device=x.device))
    if gaussian:  # Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite
        numbers = []
        for radius_word, angle_word in ((words[0], words[1]), (words[2], words[3])):
            radius = (-2.0 * (1.0 - unit_interval(radius_word, dtype)).log()).sqrt()
            angle = (2.0 * torch.pi) * unit_interval(angle_word, dtype)
            numbers += [radius * angle.cos(), radius * angle.sin()]
    else:
        numbers = [unit_interval(word, dtype) for word in words]
    flat = torch.stack(numbers, dim=1).reshape(-1)[: x.numel()]
    return flat.as_strided(x.shape, torch.empty_like(x).stride())


def draw_key(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw a Philox key: one int64 on ``device``, from PyTorch's generator there."""
    if generator is not None:
        check_generator(generator, device)
    elif device.type == "cpu" and not is_compiling():
        key = backends.draw_key()
        if key is not NotImplemented:
            return key
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)
