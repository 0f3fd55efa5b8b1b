"""A 3x3 convolution of the U-Net with everything that follows it, in one launch:

    a = log sigmoid(convolution(x) + bias)
    out[:, first : first + C] = a          where the next convolution, or a later one, reads it
    pooled = the 2x2 maximum of a          in the encoder, as F.max_pool2d(a, 2, padding=(H % 2, W % 2))

The convolution has stride 1 and padding 1, or is transposed with stride 2 and padding 1, which doubles the size. It is
a matrix product of pixels and output channels that sums over taps and input channels (implicit GEMM): a program sums a
tile of pixels by a block of channels, reading for each tap the pixels that lie that far beside its own. A pixel of a
transposed convolution takes 1, 2, 2 or 4 taps, depending on whether its row and column are odd; a program has pixels of
one kind. For pooling, pixels are taken in the order of 2x2 windows, so that a window lies within a tile.

x and all results are channels-last tensors of one dtype, fp32, bf16 or fp16; sums are fp32. fp32 products are "tf32",
"tf32x3" (three products, nearly as exact as fp32) or "ieee". Every size except the batch is a compile-time constant.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .philox import LN_2, special
from .tile import fast_math, on_device

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


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["batch"])
def convolution_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pooled_ptr,
    batch: tl.int64,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PIXELS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    blocks: tl.constexpr = (IN + K - 1) // K
    place = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    if pooled_ptr is not None:
        columns: tl.constexpr = (WIDTH + 1) // 2
        count: tl.constexpr = (HEIGHT + 1) // 2 * columns  # windows of a sample
        sample, window, corner = place // 4 // count, (place // 4 % count).to(tl.int32), (place % 4).to(tl.int32)
        # An odd size is padded at the front: its first window begins at -1.
        row = window // columns * 2 - HEIGHT % 2 + corner // 2
        column = window % columns * 2 - WIDTH % 2 + corner % 2
        real = (sample < batch) & (row >= 0) & (column >= 0)
    else:
        sample, inner = place // (HEIGHT * WIDTH), (place % (HEIGHT * WIDTH)).to(tl.int32)
        row, column = inner // WIDTH, inner % WIDTH
        real = sample < batch
    pixel = (sample * HEIGHT + row) * WIDTH + column

    odd_row, odd_column, across, taps = 0, 0, 3, 9
    if TRANSPOSED:
        kind = 3 - tl.program_id(2)  # those of four taps begin first
        odd_row, odd_column = kind // 2, kind % 2
        across, taps = 1 + odd_column, (1 + odd_row) * (1 + odd_column)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    known = channel < OUT
    lane = tl.arange(0, K)
    total = tl.zeros((PIXELS, N), tl.float32)
    for index in range(taps * blocks):
        tap, first = index // blocks, index % blocks * K
        i, j = tap // across, tap % across
        if TRANSPOSED:  # out[2 y + odd] sums x[y + odd - i] weight[1 - odd + 2 i] over i = 0 .. odd
            above, beside = odd_row - i, odd_column - j
            i, j = 1 - odd_row + 2 * i, 1 - odd_column + 2 * j
        else:
            above, beside = i - 1, j - 1
        inside = real & (row + above >= 0) & (row + above < HEIGHT)
        inside = inside & (column + beside >= 0) & (column + beside < WIDTH)
        source = (pixel + (above * WIDTH + beside)) * IN + first
        weights = (channel * 9 + (3 * i + j)) * IN + first
        x_mask, weight_mask = inside[:, None], known[:, None]
        if IN % K != 0:
            x_mask = x_mask & (first + lane < IN)[None, :]
            weight_mask = weight_mask & (first + lane < IN)[None, :]
        x = tl.load(x_ptr + source[:, None] + lane[None, :], mask=x_mask, other=0.0)
        weight = tl.load(weight_ptr + weights[:, None] + lane[None, :], mask=weight_mask, other=0.0)
        if not FAST:  # the interpreter's products of bf16 are wrong: convert to fp32, which is exact
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)

    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    a = log_sigmoid(total + bias[None, :], FAST)
    to, written = pixel, real
    if TRANSPOSED:
        row, column = 2 * row + odd_row, 2 * column + odd_column
        to = (sample * OUT_HEIGHT + row) * OUT_WIDTH + column
        written = real & (row < OUT_HEIGHT) & (column < OUT_WIDTH)
    to = (to * OUT_CHANNELS + FIRST)[:, None] + channel[None, :]
    tl.store(out_ptr + to, a.to(out_ptr.dtype.element_ty), mask=written[:, None] & known[None, :])
    if pooled_ptr is not None:
        a = tl.reshape(tl.where(real[:, None], a, float("-inf")), (PIXELS // 4, 4, N))
        largest = tl.reduce(a, 1, nan_maximum)
        window = tl.program_id(0).to(tl.int64) * (PIXELS // 4) + tl.arange(0, PIXELS // 4)
        real_window = window < batch * (((HEIGHT + 1) // 2) * ((WIDTH + 1) // 2))
        to = (window * OUT)[:, None] + channel[None, :]
        mask = real_window[:, None] & known[None, :]
        tl.store(pooled_ptr + to, largest.to(pooled_ptr.dtype.element_ty), mask=mask)


def launch_config(pixels: int, out: int, channels: int, kinds: int, itemsize: int) -> dict[str, int]:
    """Returns the tile of a program.

    Args:
        pixels: how many pixels of each kind there are in the batch.
        out, channels: output and input channels.
        kinds: 4 for a transposed convolution, else 1.
        itemsize: bytes of an element.
    """
    k = min(max(triton.next_power_of_2(channels), 16), 128 // itemsize)
    n = min(max(triton.next_power_of_2(out), 16), 128)
    if triton.cdiv(pixels, 128) * triton.cdiv(out, n) * kinds >= 132:
        return {"PIXELS": 128, "N": n, "K": k, "num_warps": 4 if n < 128 else 8, "num_stages": 4}
    return {"PIXELS": 32, "N": min(n, 32), "K": k, "num_warps": 4, "num_stages": 4}


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    pooled: Tensor | None = None,
    transposed: bool = False,
    precision: str = "ieee",
    config: dict[str, Any] | None = None,
) -> None:
    """Writes the activation to channels ``first``, ``first + 1``, ... of ``out`` and, if given, its maxima.

    Args:
        x: ``[B, C, H, W]``, dense and channels last, like all images here.
        weight: contiguous ``[O, 3, 3, C]``, of x's dtype.
        bias: ``[O]``.
        out: ``[B, O', H, W]``, or of twice the size, or one row or column less than that, if transposed.
        pooled: ``[B, O, ceil(H / 2), ceil(W / 2)]``, or None.
        transposed: whether to compute ``F.conv_transpose2d(x, weight.permute(3, 0, 1, 2), stride=2, padding=1)``.
        precision: of fp32 products: "ieee", "tf32x3" or "tf32".
    """
    if not out.numel():
        return
    batch, channels, height, width = x.shape
    pixels = height * width if pooled is None else 4 * pooled.shape[2] * pooled.shape[3]
    kinds = 4 if transposed else 1
    config = config or launch_config(batch * pixels, len(weight), channels, kinds, x.itemsize)
    grid = (triton.cdiv(batch * pixels, config["PIXELS"]), triton.cdiv(len(weight), config["N"]), kinds)
    with on_device(x):
        convolution_kernel[grid](
            x,
            weight,
            bias,
            out,
            pooled,
            batch,
            HEIGHT=height,
            WIDTH=width,
            IN=channels,
            OUT=len(weight),
            OUT_HEIGHT=out.shape[2],
            OUT_WIDTH=out.shape[3],
            OUT_CHANNELS=out.shape[1],
            FIRST=first,
            TRANSPOSED=transposed,
            PRECISION=precision,
            FAST=fast_math(x),
            **config,
        )
