"""The U-Net's first 3x3 convolution, of an image and the time, with everything that follows it, in one launch:

    a = log sigmoid(convolution(x) + bias + t plane)
    out[:, first : first + C] = a          where a later convolution reads it
    pooled = the 2x2 maximum of a          as F.max_pool2d(a, 2, padding=(H % 2, W % 2))

The plane is what the time channel contributes at t = 1, fp32 ``[H, W, C]``. x, the results and the weights are channels
last, of one dtype, fp32, bf16 or fp16; products and sums are fp32. An image has too few channels for tensor cores: one
channel has nine products for each output. A program handles some windows of the four pixels that are pooled, and a
block of output channels. Every size except the batch is a compile-time constant.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .convolution import log_sigmoid, nan_maximum
from .tile import WARPS, fast_math, on_device

_ELEMENTS = 1024  # per program, for each pixel of a window: 8 per thread, 128 bits of bf16
_MAX_CHANNELS = 256


@triton.jit(do_not_specialize=["batch"])
def stem_convolution_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    t_ptr,
    plane_ptr,
    out_ptr,
    pooled_ptr,
    batch: tl.int64,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    WINDOWS: tl.constexpr,
    C: tl.constexpr,
    FAST: tl.constexpr,
):
    columns: tl.constexpr = (WIDTH + 1) // 2
    count: tl.constexpr = (HEIGHT + 1) // 2 * columns  # windows of a sample
    window = tl.program_id(0).to(tl.int64) * WINDOWS + tl.arange(0, WINDOWS)
    sample = window // count
    place = (window % count).to(tl.int32)
    # An odd size is padded at the front: its first window begins at -1.
    top, left = place // columns * 2 - HEIGHT % 2, place % columns * 2 - WIDTH % 2
    channel = tl.program_id(1) * C + tl.arange(0, C)
    real, known = sample < batch, channel < CHANNELS
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    t = tl.load(t_ptr + sample, mask=real, other=0.0).to(tl.float32)[:, None]
    largest = tl.full((WINDOWS, C), float("-inf"), tl.float32)
    for corner in tl.static_range(4):
        row, column = top + corner // 2, left + corner % 2
        inside = real & (row >= 0) & (column >= 0)
        mask = inside[:, None] & known[None, :]
        pixel = (sample * HEIGHT + row) * WIDTH + column
        planar = (row * WIDTH + column) * CHANNELS
        v = bias + t * tl.load(plane_ptr + planar[:, None] + channel[None, :], mask=mask, other=0.0)
        for c in range(IN):
            for i in tl.static_range(3):
                for j in tl.static_range(3):
                    above, beside = row + (i - 1), column + (j - 1)
                    exists = inside & (above >= 0) & (above < HEIGHT) & (beside >= 0) & (beside < WIDTH)
                    source = (pixel + ((i - 1) * WIDTH + (j - 1))) * IN + c
                    x = tl.load(x_ptr + source, mask=exists, other=0.0).to(tl.float32)
                    at = (channel * 9 + (3 * i + j)) * IN + c
                    w = tl.load(weight_ptr + at, mask=known, other=0.0).to(tl.float32)
                    v += x[:, None] * w[None, :]
        a = log_sigmoid(v, FAST)
        to = (pixel * OUT_CHANNELS + FIRST)[:, None] + channel[None, :]
        tl.store(out_ptr + to, a.to(out_ptr.dtype.element_ty), mask=mask)
        largest = nan_maximum(largest, tl.where(inside[:, None], a, float("-inf")))
    to = (window * CHANNELS)[:, None] + channel[None, :]
    tl.store(pooled_ptr + to, largest.to(pooled_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])


def launch_config(batch: int, height: int, width: int, channels: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Returns the tile of a program, which does not depend on the batch, and the grid."""
    block = min(triton.next_power_of_2(channels), _MAX_CHANNELS)
    windows = _ELEMENTS // block
    count = batch * triton.cdiv(height, 2) * triton.cdiv(width, 2)
    return {"WINDOWS": windows, "C": block}, (triton.cdiv(count, windows), triton.cdiv(channels, block))


def stem_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, t: Tensor, plane: Tensor, out: Tensor, pooled: Tensor, *, first: int = 0
) -> None:
    """Writes the activation to channels ``first``, ``first + 1``, ... of ``out``, and its maxima to ``pooled``.

    Args:
        x: ``[B, C, H, W]``, dense and channels last, like all images here.
        weight: contiguous ``[O, 3, 3, C]``.
        bias: ``[O]``.
        t, plane: ``[B]``, and contiguous fp32 ``[H, W, O]``.
        out: ``[B, O', H, W]``.
        pooled: ``[B, O, ceil(H / 2), ceil(W / 2)]``.
    """
    if not out.numel():
        return
    batch, channels, height, width = x.shape
    constants, grid = launch_config(batch, height, width, len(weight))
    with on_device(x):
        stem_convolution_kernel[grid](
            x,
            weight,
            bias,
            t,
            plane,
            out,
            pooled,
            batch,
            HEIGHT=height,
            WIDTH=width,
            IN=channels,
            CHANNELS=len(weight),
            OUT_CHANNELS=out.shape[1],
            FIRST=first,
            FAST=fast_math(x),
            num_warps=WARPS,
            **constants,
        )
