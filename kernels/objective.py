"""What the kernels of a training step load: the coefficients of its objective, the data and the noise."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import STREAM_TRAINING_NOISE, tile_normal
from .tile import aligned_size

# The columns of a table of coefficients fp32 [B, 6] (fastsde.objective.Coefficients).
TAU, U_X, U_Z, W_F, W_X, W_Z = (tl.constexpr(column) for column in range(6))
_COLUMNS = tl.constexpr(6)


@triton.jit
def load_step(step, step_ptr):
    """Returns the training step: the argument, plus a counter on the device if there is one."""
    if step_ptr is not None:
        step += tl.load(step_ptr)
    return step


@triton.jit
def load_coefficient(table_ptr, sample, exists, COLUMN: tl.constexpr):
    """Loads a column of the table, for samples ``[S]``."""
    return tl.load(table_ptr + sample * _COLUMNS + COLUMN, mask=exists, other=0.0)


@triton.jit
def load_data(
    x_0_ptr, index_ptr, sample, exists, element, mask, coefficient, size, count, scale, shift, ALIGNED: tl.constexpr
):
    """Loads scale x_0 + shift in fp32 from uint8 or float data, with the rows gathered by an index if there is one.

    Samples whose ``coefficient`` ``[S]`` is zero are not read. An index outside of the ``count`` rows gives NaN.
    """
    needed = coefficient != 0.0
    row = sample
    if index_ptr is not None:
        row = tl.load(index_ptr + sample, mask=exists, other=0)
        inside = (row >= 0) & (row < count)
        shift = tl.where(inside | ~needed, shift, float("nan"))[:, None]
        needed = needed & inside
    offset = row[:, None] * aligned_size(size, ALIGNED) + element[None, :]
    x_0 = tl.load(x_0_ptr + offset, mask=mask & needed[:, None], other=0).to(tl.float32)
    return scale * x_0 + shift


@triton.jit
def training_noise(
    z_ptr, keys_ptr, step, sample, exists, start, offset, mask, coefficient, P: tl.constexpr, FAST: tl.constexpr
):
    """Returns the noise of a training step, drawn or loaded; not loaded where ``coefficient`` ``[S]`` is zero."""
    if z_ptr is not None:
        return tl.load(z_ptr + offset, mask=mask & (coefficient != 0.0)[:, None], other=0.0)
    else:
        return tile_normal(keys_ptr, sample, exists, start, step, STREAM_TRAINING_NOISE, P, FAST)
