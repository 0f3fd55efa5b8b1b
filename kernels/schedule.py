"""alpha(t), sigma(t) and beta(t) of the VP-SDE (the twin of ``fastsde/sde.py``), and what a training step loads."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import STREAM_TRAINING_NOISE, tile_normal
from .tile import aligned_size


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
def load_step(step, step_ptr):
    """The training step: an argument, plus a counter on the device where there is one."""
    if step_ptr is not None:
        step += tl.load(step_ptr)
    return step


@triton.jit
def load_data(x_0_ptr, index_ptr, sample, exists, element, mask, size, count, scale, shift, ALIGNED: tl.constexpr):
    """scale x_0 + shift in fp32 for uint8 or float data, rows gathered by an index where there is one.

    An index outside the ``count`` rows of the data gives NaN.
    """
    row = sample
    if index_ptr is not None:
        row = tl.load(index_ptr + sample, mask=exists, other=0)
        mask = mask & ((row >= 0) & (row < count))[:, None]
    offset = row[:, None] * aligned_size(size, ALIGNED) + element[None, :]
    x_0 = tl.load(x_0_ptr + offset, mask=mask, other=0).to(tl.float32)
    return tl.where(mask, scale * x_0 + shift, float("nan"))


@triton.jit
def training_noise(z_ptr, keys_ptr, step, sample, exists, start, offset, mask, P: tl.constexpr, FAST: tl.constexpr):
    """The noise of a training step: as given, or drawn."""
    if z_ptr is not None:
        return tl.load(z_ptr + offset, mask=mask, other=0.0)
    else:
        return tile_normal(keys_ptr, sample, exists, start, step, STREAM_TRAINING_NOISE, P, FAST)
