"""Everything after a convolution of the U-Net, in one pass over its result y (``[B, C, H, W]``, channels last):

    a = log sigmoid(y + bias + t plane)    the time plane in the first layer only
    out[:, first : first + C] = a          where the next convolution, or a later one, reads it
    pooled = the 2x2 maximum of a          in the encoder, as F.max_pool2d(a, 2, padding=(H % 2, W % 2))

y and all results are channels-last tensors of one dtype, fp32, bf16 or fp16; the arithmetic is fp32. A program handles
some windows (of one pixel, or of the four pixels that are pooled) of a block of channels. Every size except the batch
size is a compile-time constant: a network compiles one variant per layer, and divides by constants.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .philox import LN_2, special
from .tile import WARPS, fast_math, on_device

_ELEMENTS = 1024  # per program, for each pixel of a window: 8 per thread, 128 bits of bf16
_MAX_CHANNELS = 256

LOG2_E = tl.constexpr(math.log2(math.e))


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


@triton.jit(do_not_specialize=["batch"])
def bias_activation_kernel(
    y_ptr,
    bias_ptr,
    t_ptr,
    plane_ptr,
    out_ptr,
    pooled_ptr,
    batch: tl.int64,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    SIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    C: tl.constexpr,
    FAST: tl.constexpr,
):
    columns: tl.constexpr = (WIDTH + SIDE - 1) // SIDE
    count: tl.constexpr = (HEIGHT + SIDE - 1) // SIDE * columns  # windows of a sample
    window = tl.program_id(0).to(tl.int64) * WINDOWS + tl.arange(0, WINDOWS)
    sample = window // count
    place = (window % count).to(tl.int32)
    # An odd size is padded at the front: its first window begins at -1.
    top, left = place // columns * SIDE - HEIGHT % SIDE, place % columns * SIDE - WIDTH % SIDE
    channel = tl.program_id(1) * C + tl.arange(0, C)
    real, known = sample < batch, channel < CHANNELS
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if plane_ptr is not None:
        t = tl.load(t_ptr + sample, mask=real, other=0.0).to(tl.float32)[:, None]
    largest = tl.full((WINDOWS, C), float("-inf"), tl.float32)

    for i in tl.static_range(SIDE):
        for j in tl.static_range(SIDE):
            row, column = top + i, left + j
            inside = (real & (row >= 0) & (column >= 0))[:, None]
            mask = inside & known[None, :]
            pixel = (sample * HEIGHT + row) * WIDTH + column
            v = tl.load(y_ptr + (pixel * CHANNELS)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            v += bias
            if plane_ptr is not None:
                planar = (row * WIDTH + column).to(tl.int64) * CHANNELS
                v += t * tl.load(plane_ptr + planar[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            a = log_sigmoid(v, FAST)
            to = (pixel * OUT_CHANNELS + FIRST)[:, None] + channel[None, :]
            tl.store(out_ptr + to, a.to(out_ptr.dtype.element_ty), mask=mask)
            if pooled_ptr is not None:
                a = tl.where(inside, a, float("-inf"))
                largest = tl.maximum(largest, a, propagate_nan=tl.PropagateNan.ALL)
    if pooled_ptr is not None:
        to = (window * CHANNELS)[:, None] + channel[None, :]
        mask = real[:, None] & known[None, :]
        tl.store(pooled_ptr + to, largest.to(pooled_ptr.dtype.element_ty), mask=mask)


def launch_config(
    batch: int, height: int, width: int, channels: int, side: int
) -> tuple[dict[str, int], tuple[int, int]]:
    """Returns the tile of a program, which does not depend on the batch, and the grid."""
    block = min(triton.next_power_of_2(channels), _MAX_CHANNELS)
    windows = _ELEMENTS // block
    count = batch * triton.cdiv(height, side) * triton.cdiv(width, side)
    return {"SIDE": side, "WINDOWS": windows, "C": block}, (triton.cdiv(count, windows), triton.cdiv(channels, block))


def bias_activation(
    y: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    t: Tensor | None = None,
    plane: Tensor | None = None,
    pooled: Tensor | None = None,
) -> None:
    """Writes the activation to channels ``first``, ``first + 1``, ... of ``out`` and, where given, its pool.

    Args:
        y: ``[B, C, H, W]``, dense and channels last, like all images here.
        bias: ``[C]``.
        out: ``[B, C', H, W]``; may be ``y`` itself.
        t, plane: ``[B]`` and contiguous ``[H, W, C]``, or None.
        pooled: ``[B, C, ceil(H / 2), ceil(W / 2)]``, or None.
    """
    if not y.numel():
        return
    batch, channels, height, width = y.shape
    constants, grid = launch_config(batch, height, width, channels, 1 if pooled is None else 2)
    with on_device(y):
        bias_activation_kernel[grid](
            y,
            bias,
            t,
            plane,
            out,
            pooled,
            batch,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            OUT_CHANNELS=out.shape[1],
            FIRST=first,
            FAST=fast_math(y),
            num_warps=WARPS,
            **constants,
        )
