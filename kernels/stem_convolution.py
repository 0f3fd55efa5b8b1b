"""The U-Net's first 3x3 convolution, of an image and the time, with everything that follows it, in one launch:

    a = log sigmoid(scale * (convolution(x) + bias + t plane) + shift)
    out[:, first : first + C] = a          where a later convolution reads it
    pooled = the 2x2 maximum of a          as F.max_pool2d(a, 2, padding=(H % 2, W % 2))

Scales and shifts, of each image and channel, are optional.

The plane is what the time channel contributes at t = 1, fp32 ``[H, W, C]``. x, the results and the weights are channels
last, of one dtype, fp32, bf16 or fp16; products and sums are fp32. An image has too few channels for tensor cores: one
channel has nine products for each output. A program handles some windows of the four pixels that are pooled, and a
block of output channels. Every size except the batch is a compile-time constant.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .log_sigmoid import load_film, log_sigmoid, modulated, tf32_rounded
from .pooled_convolution import nan_maximum, window_origin
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
    film_ptr,
    batch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    FILM: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOWS: tl.constexpr,
    C: tl.constexpr,
    FAST: tl.constexpr,
):
    window = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    sample, top, left = window_origin(window, HEIGHT, WIDTH)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    real, known = sample < batch, channel < CHANNELS
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    t = tl.load(t_ptr + sample, mask=real, other=0.0).to(tl.float32)[:, None]
    corner = ((sample * HEIGHT + top) * WIDTH + left).to(tl.int64)  # the window's first pixel
    sums = ()  # of the window's four pixels
    for _ in tl.static_range(4):
        sums = sums + (tl.zeros((WINDOWS, C), tl.float32),)  # noqa: RUF005
    for c in range(IN):
        pixels = ()  # the 4x4 pixels that the window's products take
        for i in tl.static_range(4):
            for j in tl.static_range(4):
                row, column = top + (i - 1), left + (j - 1)
                exists = real & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
                source = (corner + ((i - 1) * WIDTH + (j - 1))) * IN + c
                x = tl.load(x_ptr + source, mask=exists, other=0.0).to(tl.float32)
                pixels = pixels + (x[:, None],)  # noqa: RUF005
        for tap in tl.static_range(9):
            at = (channel * 9 + tap) * IN + c
            weight = tl.load(weight_ptr + at, mask=known, other=0.0).to(tl.float32)[None, :]
            sums = _add_tap(sums, pixels, weight, tap)
    film = load_film(film_ptr, sample, real, channel, CHANNELS, FILM)
    largest = tl.full((WINDOWS, C), float("-inf"), tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            row, column = top + i, left + j
            inside = (real & (row >= 0) & (column >= 0))[:, None]
            mask = inside & known[None, :]
            planar = (row * WIDTH + column).to(tl.int64) * CHANNELS
            plane = tl.load(plane_ptr + planar[:, None] + channel[None, :], mask=mask, other=0.0)
            v = modulated(sums[2 * i + j] + bias + t * plane, film, FILM)
            a = tf32_rounded(log_sigmoid(v, FAST), PRECISION)
            to = ((corner + (i * WIDTH + j)) * OUT_CHANNELS + FIRST)[:, None] + channel[None, :]
            tl.store(out_ptr + to, a.to(out_ptr.dtype.element_ty), mask=mask)
            largest = nan_maximum(largest, tl.where(inside, a, float("-inf")))
    to = (window.to(tl.int64) * CHANNELS)[:, None] + channel[None, :]
    tl.store(pooled_ptr + to, largest.to(pooled_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])


@triton.jit
def _add_tap(sums, pixels, weight, TAP: tl.constexpr):
    """Adds the products of one tap to the sums of a window's four pixels."""
    out = ()
    for k in tl.static_range(4):
        out = out + (sums[k] + pixels[(k // 2 + TAP // 3) * 4 + k % 2 + TAP % 3] * weight,)  # noqa: RUF005
    return out


def launch_config(batch: int, height: int, width: int, channels: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Returns the tile of a program, which does not depend on the batch, and the grid."""
    block = min(triton.next_power_of_2(channels), _MAX_CHANNELS)
    windows = _ELEMENTS // block
    count = batch * triton.cdiv(height, 2) * triton.cdiv(width, 2)
    return {"WINDOWS": windows, "C": block}, (triton.cdiv(count, windows), triton.cdiv(channels, block))


def stem_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    t: Tensor,
    plane: Tensor,
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
        weight: contiguous ``[O, 3, 3, C]``.
        bias: ``[O]``.
        t, plane: ``[B]``, and contiguous fp32 ``[H, W, O]``.
        out: ``[B, O', H, W]``, whose channel ``first`` is the first that is written.
        pooled: ``[B, O, ceil(H / 2), ceil(W / 2)]``.
        film: fp32 ``[B, 2 O]`` with contiguous rows: of each image its scales - 1, then its shifts; or None.
        precision: of the products that the results are for: "narrow", "tf32x3" or "tf32", for which they are rounded.
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
            film,
            batch,
            HEIGHT=height,
            WIDTH=width,
            IN=channels,
            CHANNELS=len(weight),
            OUT_CHANNELS=out.shape[1],
            FIRST=first,
            FILM=0 if film is None else film.stride(0),
            PRECISION=precision,
            FAST=fast_math(x),
            num_warps=WARPS,
            **constants,
        )
