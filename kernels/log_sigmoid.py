"""What the U-Net's layers do after their sums: modulation, the log sigmoid, and rounding for the next product."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .philox import LN_2, special

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_film(film_ptr, sample, exists, channel, CHANNELS: tl.constexpr, FILM: tl.constexpr):
    """Loads what `modulated` takes: scales - 1 and shifts ``[samples, channels]``, or nothing if ``FILM`` is 0.

    Args:
        film_ptr: fp32 rows, ``FILM`` apart: of each sample ``CHANNELS`` scales - 1, then as many shifts.
        exists: for which samples to load them; for the others they are 0.
    """
    if FILM == 0:
        return ()
    else:
        mask = exists[:, None] & (channel < CHANNELS)[None, :]
        at = film_ptr + (sample.to(tl.int64) * FILM)[:, None] + channel[None, :]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + CHANNELS, mask=mask, other=0.0)


@triton.jit
def modulated(v, film, FILM: tl.constexpr):
    """Computes (1 + a) v + b (FiLM, Perez et al. 2017, arXiv:1709.07871), or returns v if ``FILM`` is 0."""
    if FILM == 0:
        return v
    else:
        return (1.0 + film[0]) * v + film[1]


@triton.jit
def log_sigmoid(v, FAST: tl.constexpr):
    """Computes min(v, 0) - log1p(exp(-|v|)) of fp32 v; NaN stays NaN.

    With the special-function unit the error is at most 4e-7 + 2^-24 |v|: in u = exp(-|v|), ex2 contributes 2^-22 u, of
    which log1p leaves half at most, and its rounded argument 2^-23.4 |v| u; lg2 is off by 2^-22 on [1, 2], and rounding
    1 + u by 2^-24. For u below 2^-7, where these absolute errors would be large next to the small result, a series
    (its first omitted term is u^4 / 4) bounds the relative error: at most 5e-7 + 2^-23.4 |v|.
    """
    if FAST:
        u = special(tl.abs(v) * -LOG2_E, "ex2.approx.ftz.f32 $0, $1;")
        logarithm = special(1.0 + u, "lg2.approx.ftz.f32 $0, $1;") * LN_2
    else:
        u = tl.exp(-tl.abs(v))
        logarithm = tl.log(1.0 + u)
    series = u * (1.0 - u * (0.5 - u * (1.0 / 3.0)))
    return tl.minimum(v, 0.0) - tl.where(u < 2.0**-7, series, logarithm)


@triton.jit
def tf32_rounded(a, PRECISION: tl.constexpr):
    """Rounds fp32 to the nearest number of 11 significant bits for products in "tf32", which would truncate it."""
    if PRECISION == "tf32":
        bits = (a.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)
        return tl.where(a == a, bits.to(tl.float32, bitcast=True), a)  # a NaN's bits may carry over into the sign
    else:
        return a
