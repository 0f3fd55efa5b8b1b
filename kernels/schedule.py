"""alpha(t), sigma(t) and beta(t) of the VP-SDE (the twin of ``fastsde/sde.py``), and the data as training loads it."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import STREAM_TRAINING_NOISE, draw_offset, normal


@triton.jit
def integral_beta(t, beta_min, beta_max):
    return (beta_min + 0.5 * (beta_max - beta_min) * t) * t


@triton.jit
def alpha_sigma(t, beta_min, beta_max):
    """The factor of x_0, and the standard deviation sqrt(-expm1(-B)) without the cancellation of 1 - exp(-B)."""
    integral = integral_beta(t, beta_min, beta_max)
    power = tl.exp(-integral)
    # 1 - power is exact for the rounded power, whose true exponent is its logarithm (Kahan's expm1). Of a power that
    # rounds 1 - power to 1, or to 0 itself, no logarithm is needed.
    between = (power < 1.0) & (power > 2.0**-25)
    exact = (1.0 - power) * (integral / -tl.log(tl.where(between, power, 0.5)))
    variance = tl.where(between, exact, tl.where(power == 1.0, integral, 1.0))
    return tl.exp(-0.5 * integral), tl.sqrt(variance)


@triton.jit
def load_data(x_0_ptr, index_ptr, sample, element, sample_mask, mask, size, count, scale, shift):
    """scale x_0 + shift in fp32 for uint8 or float data, rows gathered by an index where there is one.

    An index outside the ``count`` rows of the data gives NaN.
    """
    row = sample
    if index_ptr is not None:
        row = tl.load(index_ptr + sample, mask=sample_mask, other=0)
        mask = mask & ((row >= 0) & (row < count))[:, None]
    x_0 = tl.load(x_0_ptr + row[:, None] * size + element[None, :], mask=mask, other=0).to(tl.float32)
    return tl.where(mask, scale * x_0 + shift, float("nan"))


@triton.jit
def training_noise(
    z_ptr, keys_ptr, step, sample, start, offset, sample_mask, mask, P: tl.constexpr, FAST: tl.constexpr
):
    """The noise of a training step: as given, or drawn."""
    if z_ptr is not None:
        return tl.load(z_ptr + offset, mask=mask, other=0.0)
    seed = tl.load(keys_ptr + 2 * sample, mask=sample_mask, other=0)
    first = tl.load(keys_ptr + 2 * sample + 1, mask=sample_mask, other=0)
    first += draw_offset(step, STREAM_TRAINING_NOISE) + start
    return normal(seed[:, None], first[:, None] + tl.arange(0, P)[None, :], FAST)
