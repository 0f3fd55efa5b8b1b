"""The U-Net's last convolution, 3x3 from C channels to the 1 to 4 channels of an image, with bias, in one launch:

    out[b, o, i, j] = bias[o] + sum over c, di, dj of weight[o, c, di, dj] y[b, c, i + di - 1, j + dj - 1]

y and the weights are channels last, out is contiguous ``[B, O, H, W]``; all of one dtype, fp32, bf16 or fp16. Products
and sums are fp32. cuDNN would write the result, read it again to add the bias, and leave it channels last.

For one output channel the tensor cores would multiply by seven columns of zeros. y is read once from memory; the other
eight taps find it in the cache. On sm_90 all nine taps take 43 thread-instructions per channel and pixel in bf16, 35 in
fp32 (``python -m fastsde.benchmarks.sass``); an H200 issues 15 and 31 in the time that reading y takes. So for many
images in bf16 instructions are the limit, at some 3 times the memory time, which is a small part of the network's; for
few images the launch is the limit, and this is one launch instead of two or three.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tile import WARPS, on_device

MAX_OUT = 4  # output channels; each takes as many registers as the tile has elements per thread
_ELEMENTS = 2048  # per program: 16 per thread
_MAX_CHANNELS = 64  # per block; more channels take several blocks


@triton.jit(do_not_specialize=["batch"])
def head_convolution_kernel(
    y_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    batch: tl.int64,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
):
    plane: tl.constexpr = HEIGHT * WIDTH
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    sample = pixel // plane
    place = (pixel % plane).to(tl.int32)
    row, column = place // WIDTH, place % WIDTH
    real = sample < batch
    lane = tl.arange(0, C)
    sums = ()  # a tile for each output channel
    for _ in tl.static_range(OUT):
        sums = sums + (tl.zeros((PIXELS, C), tl.float32),)  # noqa: RUF005
    for first in range(0, CHANNELS, C):
        channel = first + lane
        known = channel < CHANNELS
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                above, beside = row + (i - 1), column + (j - 1)
                inside = real & (above >= 0) & (above < HEIGHT) & (beside >= 0) & (beside < WIDTH)
                source = (pixel + ((i - 1) * WIDTH + (j - 1))) * CHANNELS
                mask = inside[:, None] & known[None, :]
                y = tl.load(y_ptr + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                weights = weight_ptr + (3 * i + j) * CHANNELS + channel
                sums = _add_products(sums, y, weights, known, 9 * CHANNELS)
    for o in tl.static_range(OUT):
        result = tl.sum(sums[o], 1) + tl.load(bias_ptr + o).to(tl.float32)
        to = out_ptr + (sample * OUT + o) * plane + place
        tl.store(to, result.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _add_products(sums, y, weights, known, STRIDE: tl.constexpr):
    """Adds y times its weights to the sums of each output channel; the channels' weights are STRIDE apart."""
    out = ()
    for o in tl.static_range(len(sums)):
        w = tl.load(weights + o * STRIDE, mask=known, other=0.0).to(tl.float32)
        out = out + (sums[o] + y * w[None, :],)  # noqa: RUF005
    return out


def launch_config(batch: int, height: int, width: int, channels: int) -> tuple[dict[str, int], tuple[int]]:
    """Returns the tile of a program, which does not depend on the batch, and the grid."""
    block = min(triton.next_power_of_2(channels), _MAX_CHANNELS)
    pixels = _ELEMENTS // block
    return {"PIXELS": pixels, "C": block}, (triton.cdiv(batch * height * width, pixels),)


def head_convolution(y: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Writes the convolution to ``out``.

    Args:
        y: ``[B, C, H, W]``, dense and channels last.
        weight: ``[O, C, 3, 3]``, dense and channels last, O at most `MAX_OUT`.
        bias: ``[O]``.
        out: contiguous ``[B, O, H, W]``.
    """
    if not out.numel():
        return
    batch, channels, height, width = y.shape
    constants, grid = launch_config(batch, height, width, channels)
    with on_device(y):
        head_convolution_kernel[grid](
            y,
            weight,
            bias,
            out,
            batch,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            OUT=len(weight),
            num_warps=WARPS,
            **constants,
        )
