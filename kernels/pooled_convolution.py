"""A 3x3 convolution of the U-Net's encoder with everything that follows it, in one launch:

    a = log sigmoid(scale * (convolution(x) + bias) + shift)
    out[:, first : first + C] = a          where a later convolution reads it
    pooled = the 2x2 maximum of a          as F.max_pool2d(a, 2, padding=(H % 2, W % 2))

Scales and shifts, of each image and channel, are optional.

It is a matrix product of pixels and output channels that sums over taps and input channels (implicit GEMM): a program
has a tile of pixels and a block of channels, and reads for each tap the pixels that lie that far beside its own. Pixels
are in the order of 2x2 windows, so that a window lies within a tile.

Tensors and precisions are those of `convolution`. Every size except the batch is a compile-time constant, and there are
two variants: tiles for few and for many pixels. Pixels are counted in int32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .convolution import product
from .log_sigmoid import load_film, log_sigmoid, modulated, tf32_rounded
from .tile import PROCESSORS, fast_math, on_device


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def window_origin(window, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the sample of a 2x2 window of the batch, and the row and column of the window's first pixel.

    An odd size is padded at the front: its first window begins at -1.
    """
    columns: tl.constexpr = (WIDTH + 1) // 2
    count: tl.constexpr = (HEIGHT + 1) // 2 * columns  # windows of a sample
    sample, place = window // count, window % count
    return sample, place // columns * 2 - HEIGHT % 2, place % columns * 2 - WIDTH % 2


@triton.jit
def _of_pixels(values, PIXELS: tl.constexpr, N: tl.constexpr):
    """Repeats values of windows for their four pixels."""
    return tl.reshape(tl.broadcast_to(values[:, None, :], (PIXELS // 4, 4, N)), (PIXELS, N))


@triton.jit(do_not_specialize=["batch"])
def pooled_convolution_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pooled_ptr,
    film_ptr,
    batch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    FILM: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    FAST: tl.constexpr,
):
    blocks: tl.constexpr = (IN + K - 1) // K
    place = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    sample, top, left = window_origin(place // 4, HEIGHT, WIDTH)
    row, column = top + place % 4 // 2, left + place % 2
    real = (sample < batch) & (row >= 0) & (column >= 0)
    pixel = (sample * HEIGHT + row) * WIDTH + column
    channel = tl.program_id(1) * N + tl.arange(0, N)
    known = channel < OUT
    lane = tl.arange(0, K)
    total = tl.zeros((PIXELS, N), tl.float32)
    for index in range(9 * blocks):
        tap, first = index // blocks, index % blocks * K
        above, beside = tap // 3 - 1, tap % 3 - 1
        inside = real & (row + above >= 0) & (row + above < HEIGHT)
        inside = inside & (column + beside >= 0) & (column + beside < WIDTH)
        source = (pixel + (above * WIDTH + beside)).to(tl.int64) * IN + first
        weights = (channel * 9 + tap) * IN + first
        x_mask, weight_mask = inside[:, None], known[:, None]
        if IN % K != 0:
            x_mask = x_mask & (first + lane < IN)[None, :]
            weight_mask = weight_mask & (first + lane < IN)[None, :]
        x = tl.load(x_ptr + source[:, None] + lane[None, :], mask=x_mask, other=0.0)
        weight = tl.load(weight_ptr + weights[:, None] + lane[None, :], mask=weight_mask, other=0.0)
        total = product(x, weight, total, PRECISION, FAST)

    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    v = total + bias[None, :]
    if FILM != 0:  # a window is of one sample
        window = tl.program_id(0) * (PIXELS // 4) + tl.arange(0, PIXELS // 4)
        sample, _, _ = window_origin(window, HEIGHT, WIDTH)
        scale, shift = load_film(film_ptr, sample, sample < batch, channel, OUT, FILM)
        v = modulated(v, (_of_pixels(scale, PIXELS, N), _of_pixels(shift, PIXELS, N)), FILM)
    a = tf32_rounded(log_sigmoid(v, FAST), PRECISION)
    to = (pixel.to(tl.int64) * OUT_CHANNELS + FIRST)[:, None] + channel[None, :]
    tl.store(out_ptr + to, a.to(out_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])
    a = tl.reshape(tl.where(real[:, None], a, float("-inf")), (PIXELS // 4, 4, N))
    largest = tl.reduce(a, 1, nan_maximum)
    window = tl.program_id(0) * (PIXELS // 4) + tl.arange(0, PIXELS // 4)
    to = (window.to(tl.int64) * OUT)[:, None] + channel[None, :]
    windows = batch * ((HEIGHT + 1) // 2 * ((WIDTH + 1) // 2))
    mask = (window < windows)[:, None] & known[None, :]
    tl.store(pooled_ptr + to, largest.to(pooled_ptr.dtype.element_ty), mask=mask)


def launch_config(pixels: int, out: int, channels: int, itemsize: int) -> dict[str, int]:
    """Returns the tile of a program, its warps and the depth of its pipeline; measured on an H200.

    Args:
        pixels: how many pixels the batch has, with the padding.
        out, channels: output and input channels.
        itemsize: bytes of an element.
    """
    channels, out = (max(triton.next_power_of_2(each), 16) for each in (channels, out))
    n, height = min(out, 128), 128 if itemsize == 2 or out >= 128 else 64
    if triton.cdiv(pixels, height) * triton.cdiv(out, n) < PROCESSORS:
        k, n = min(channels, 256 // itemsize), min(out, 32 if out <= 128 else 16)
        return {"PIXELS": 64, "N": n, "K": k, "num_warps": 4, "num_stages": 4}
    warps = 8 if n == 128 else 4  # four would spill registers
    return {"PIXELS": height, "N": n, "K": min(channels, 128 // itemsize), "num_warps": warps, "num_stages": 3}


def pooled_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    pooled: Tensor,
    *,
    first: int = 0,
    film: Tensor | None = None,
    precision: str,
) -> None:
    """Writes the activation to channels ``first``, ``first + 1``, ... of ``out``, and its maxima to ``pooled``.

    Args:
        x: ``[B, C, H, W]``, dense and channels last, like all images here.
        weight: contiguous ``[O, 3, 3, C]``, of x's dtype.
        bias: ``[O]``.
        out: ``[B, O', H, W]``, whose channel ``first`` is the first that is written.
        pooled: ``[B, O, ceil(H / 2), ceil(W / 2)]``.
        film: fp32 ``[B, 2 O]`` with contiguous rows: of each image its scales - 1, then its shifts; or None.
        precision: "narrow", "tf32x3" or "tf32".
    """
    if not out.numel():
        return
    batch, channels, height, width = x.shape
    pixels = 4 * batch * pooled.shape[2] * pooled.shape[3]
    config = launch_config(pixels, len(weight), channels, x.itemsize)
    grid = (triton.cdiv(pixels, config["PIXELS"]), triton.cdiv(len(weight), config["N"]))
    with on_device(x):
        pooled_convolution_kernel[grid](
            x,
            weight,
            bias,
            out,
            pooled,
            film,
            batch,
            HEIGHT=height,
            WIDTH=width,
            IN=channels,
            OUT=len(weight),
            OUT_CHANNELS=out.shape[1],
            FIRST=first,
            FILM=0 if film is None else film.stride(0),
            PRECISION=precision,
            FAST=fast_math(x),
            **config,
        )
