"""Elementary functions of float32 and float64, accurate to a few ulp on every device.

The devices' fast logarithms and exponentials lose digits where critics' scores lie: near one and far below zero.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    """x / y, correctly rounded."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """sqrt(x), correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def exp_of_negative(x):
    """exp(x) for x <= 0, as exp2 of an integer, which is exact, times a polynomial."""
    if x.dtype == tl.float64:
        power = tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)  # underflows; NaN stays NaN
        turns = tl.floor(x * 1.4426950408889634 + 0.5)
        rest = tl.fma(turns, -0.693145751953125, x)
        rest = tl.fma(turns, -1.428606765330187e-06, rest)
        power = tl.exp2(turns) * tl.exp(rest)
    return power


@triton.jit
def _twice_artanh(s, TERMS: tl.constexpr):
    """2 artanh(s) = 2 (s + s^3 / 3 + ...)."""
    square = s * s
    series = tl.zeros_like(s)
    for i in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2.0 * s * series


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]."""
    return _twice_artanh(divide(x, 2.0 + x), 17 if x.dtype == tl.float64 else 8)


@triton.jit
def softplus(x):
    return tl.where(x > 0.0, x, 0.0) + log1p(exp_of_negative(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    power = exp_of_negative(-tl.abs(x))
    return divide(tl.where(x >= 0.0, 1.0, power), 1.0 + power)


@triton.jit
def power_of(x, exponent):
    """x^exponent for x >= 0 and a float64 exponent above 0: by float64 logarithms, with the digits that they lose."""
    base = x.to(tl.float64)
    logarithm = tl.log(base)
    product = logarithm * exponent
    lost = tl.fma(logarithm, exponent, -product) + exponent * tl.fma(base, tl.exp(-logarithm), -1.0)
    lost = tl.where(tl.abs(logarithm) < 700.0, lost, 0.0)
    return (tl.exp(product) * (1.0 + lost)).to(x.dtype)


@triton.jit
def log_of_fraction(x):
    """log(x) for normal x in (0, 1]."""
    if x.dtype == tl.float64:
        logarithm = tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23  # leaves a mantissa in [sqrt(1/2), sqrt(2))
        mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        part = _twice_artanh(divide(mantissa - 1.0, mantissa + 1.0), 7)
        logarithm = exponent.to(tl.float32) * 0.6931471805599453 + part
    return logarithm


@triton.jit
def cos_sin_of_turns(u):
    """cos(2 pi u) and sin(2 pi u) for u in [0, 1): series about the nearest eighth of a turn."""
    TERMS: tl.constexpr = 10 if u.dtype == tl.float64 else 6
    quarter = tl.floor(u * 4.0 + 0.5)
    angle = (u - quarter * 0.25) * 6.283185307179586
    square = angle * angle
    cosine = tl.zeros_like(u) + 1.0
    sine = tl.zeros_like(u) + 1.0
    for i in tl.static_range(TERMS):  # Horner's rule, from the smallest term
        cosine = 1.0 - square * cosine * (1.0 / ((2 * (TERMS - i) - 1) * (2 * (TERMS - i))))
        sine = 1.0 - square * sine * (1.0 / ((2 * (TERMS - i)) * (2 * (TERMS - i) + 1)))
    sine = angle * sine
    which = quarter.to(tl.int32) & 3
    swap = (which & 1) == 1
    real = tl.where(swap, sine, cosine)
    imaginary = tl.where(swap, cosine, sine)
    real = tl.where((which == 1) | (which == 2), -real, real)
    imaginary = tl.where(which >= 2, -imaginary, imaginary)
    return real, imaginary
