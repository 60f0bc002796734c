"""Philox-4x32-10 (Salmon et al. 2011) as in ``ops.philox``: two key words, the counter in the low two words."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from gpkernels.triton.functions import cos_sin_of_turns, log_of_fraction, square_root


@triton.jit
def philox(key, counter):
    """Four 32-bit words per 64-bit counter; ``key`` points to one int64."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(tl.load(key), low, high, zero, zero)


@triton.jit
def unit_interval(word, ACC: tl.constexpr):
    """24 random bits as a number in [0, 1)."""
    return (word >> 8).to(tl.int32).to(ACC) * (1.0 / 16777216.0)


@triton.jit
def _gaussian_pair(radius_word, angle_word, ACC: tl.constexpr):
    """Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite."""
    radius = square_root(-2.0 * log_of_fraction(1.0 - unit_interval(radius_word, ACC)))
    cosine, sine = cos_sin_of_turns(unit_interval(angle_word, ACC))
    return radius * cosine, radius * sine


@triton.jit
def random_numbers(key, group, ACC: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Four random numbers per group."""
    w0, w1, w2, w3 = philox(key, group)
    if GAUSSIAN:
        a, b = _gaussian_pair(w0, w1, ACC)
        c, d = _gaussian_pair(w2, w3, ACC)
    else:
        a, b = unit_interval(w0, ACC), unit_interval(w1, ACC)
        c, d = unit_interval(w2, ACC), unit_interval(w3, ACC)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
