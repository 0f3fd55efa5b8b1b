"""A 3x3 convolution of the U-Net's lowest level, decoder or head with everything that follows it, in one launch:

    a = log sigmoid(scale * (convolution(x) + bias) + shift)
    out[:, first : first + C] = a          where the next convolution reads it
    products[9 o + tap] = a head           instead of out, for the last convolution (`head_convolution`)

Scales and shifts, of each image and channel, are optional.

The convolution has padding 1 and stride 1, or is transposed with stride 2, which doubles the size. It is a matrix
product of pixels and output channels that sums over taps and input channels (implicit GEMM). A program has a tile of
consecutive pixels and a block of channels. For each row of taps it reads the pixels above, beside or below its own
once, multiplies them by the weights of the row's three taps, and keeps three sums; at the end each pixel adds its
neighbours' sums. So a pixel is read three times instead of nine, and the first and last pixel of a tile serve only
their neighbours. A transposed convolution sums for an even column the middle tap, for an odd one the right tap and its
right neighbour's left tap; a program has even or odd rows, of one and two rows of taps.

x and all results are channels-last tensors of one dtype; sums are fp32. The precision of products is "narrow" for bf16
and fp16, and for fp32 "tf32x3", three products that are nearly as exact as fp32, or "tf32". Tensor cores truncate what
they multiply in TF32, so for that x and the weights must have been rounded, and results are. Every size except the
batch is a compile-time constant, and there are two variants, tiles for few and for many pixels; for 32 channels of 16
bits also one for still more. Pixels are counted in int32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .log_sigmoid import load_film, log_sigmoid, modulated, tf32_rounded
from .tile import PROCESSORS, fast_math, on_device

MAX_HEAD = 4  # output channels of a last convolution whose products the layer before computes
MAX_HEAD_CHANNELS = 64  # of its input, which a tile must have whole


@triton.jit
def product(x, weight, total, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """Returns ``total + x weight^T``, in fp32."""
    if not FAST:  # the interpreter's products of bf16 are wrong, and converting to fp32 is exact
        return tl.dot(x.to(tl.float32), tl.trans(weight).to(tl.float32), total, input_precision="ieee")
    elif PRECISION == "narrow":
        return tl.dot(x, tl.trans(weight), total)
    else:
        return tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)


@triton.jit
def _neighbour(sums, by: tl.constexpr, PIXELS: tl.constexpr, N: tl.constexpr):
    """Returns for each pixel of a tile the sums of the one that lies ``by`` after it."""
    index = (tl.arange(0, PIXELS) + (by + PIXELS)) % PIXELS
    return tl.gather(sums, tl.broadcast_to(index[:, None], (PIXELS, N)), 0)


@triton.jit(do_not_specialize=["batch"])
def convolution_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    head_ptr,
    products_ptr,
    film_ptr,
    batch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEAD: tl.constexpr,
    FILM: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    FAST: tl.constexpr,
):
    blocks: tl.constexpr = (IN + K - 1) // K
    own = tl.arange(0, PIXELS)
    pixel = tl.program_id(0) * (PIXELS - 2) - 1 + own
    sample, place = pixel // (HEIGHT * WIDTH), pixel % (HEIGHT * WIDTH)
    row, column = place // WIDTH, place % WIDTH
    real = (pixel >= 0) & (sample < batch)
    odd, rows = 0, 3
    if TRANSPOSED:
        odd = 1 - tl.program_id(2)  # odd rows, which take longer, begin first
        rows = 1 + odd
    channel = tl.program_id(1) * N + tl.arange(0, N)
    known = channel < OUT
    lane = tl.arange(0, K)
    left = tl.zeros((PIXELS, N), tl.float32)
    middle = tl.zeros((PIXELS, N), tl.float32)
    right = tl.zeros((PIXELS, N), tl.float32)
    for index in range(rows * blocks):
        i, first = index // blocks, index % blocks * K
        above = i - 1
        if TRANSPOSED:  # out[2 y + odd] sums x[y + odd - i] weight[1 - odd + 2 i] over i = 0 .. odd
            above, i = odd - i, 1 - odd + 2 * i
        inside = real & (row + above >= 0) & (row + above < HEIGHT)
        source = (pixel + above * WIDTH).to(tl.int64) * IN + first
        weights = (channel * 9 + 3 * i) * IN + first
        x_mask, weight_mask = inside[:, None], known[:, None]
        if IN % K != 0:
            x_mask = x_mask & (first + lane < IN)[None, :]
            weight_mask = weight_mask & (first + lane < IN)[None, :]
        taps_ptr = weight_ptr + weights[:, None] + lane[None, :]
        x = tl.load(x_ptr + source[:, None] + lane[None, :], mask=x_mask, other=0.0)
        left = product(x, tl.load(taps_ptr, mask=weight_mask, other=0.0), left, PRECISION, FAST)
        middle = product(x, tl.load(taps_ptr + IN, mask=weight_mask, other=0.0), middle, PRECISION, FAST)
        right = product(x, tl.load(taps_ptr + 2 * IN, mask=weight_mask, other=0.0), right, PRECISION, FAST)

    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    written = (real & (own > 0) & (own < PIXELS - 1))[:, None]
    has_left, has_right = (column > 0)[:, None], (column < WIDTH - 1)[:, None]
    if TRANSPOSED:
        row = 2 * row + odd
        mask = written & known[None, :] & (row < OUT_HEIGHT)[:, None]
        to = ((sample * OUT_HEIGHT + row) * OUT_WIDTH + 2 * column).to(tl.int64)
        to = (to * OUT_CHANNELS + FIRST)[:, None] + channel[None, :]
        film = load_film(film_ptr, sample, real, channel, OUT, FILM)
        a = tf32_rounded(log_sigmoid(modulated(middle + bias, film, FILM), FAST), PRECISION)
        tl.store(out_ptr + to, a.to(out_ptr.dtype.element_ty), mask=mask)
        right += tl.where(has_right, _neighbour(left, 1, PIXELS, N), 0.0)
        a = tf32_rounded(log_sigmoid(modulated(right + bias, film, FILM), FAST), PRECISION)
        mask = mask & (2 * column + 1 < OUT_WIDTH)[:, None]
        tl.store(out_ptr + to + OUT_CHANNELS, a.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        middle += tl.where(has_left, _neighbour(left, -1, PIXELS, N), 0.0)
        middle += tl.where(has_right, _neighbour(right, 1, PIXELS, N), 0.0)
        film = load_film(film_ptr, sample, real, channel, OUT, FILM)  # not before: it would spill
        v = modulated(middle + bias, film, FILM)
        a = tf32_rounded(log_sigmoid(v, FAST), PRECISION).to(x_ptr.dtype.element_ty)
        if HEAD == 0:
            to = (pixel.to(tl.int64) * OUT_CHANNELS + FIRST)[:, None] + channel[None, :]
            tl.store(out_ptr + to, a, mask=written & known[None, :])
        else:
            of = tl.arange(0, H)
            head_mask = (of < HEAD)[:, None] & known[None, :]
            head = tl.load(head_ptr + (of * OUT)[:, None] + channel[None, :], mask=head_mask, other=0.0)
            products = product(a, head, tl.zeros((PIXELS, H), tl.float32), PRECISION, FAST)
            to = of.to(tl.int64)[None, :] * (batch * (HEIGHT * WIDTH)) + pixel[:, None]
            tl.store(products_ptr + to, products, mask=written & (of < HEAD)[None, :])


def launch_config(pixels: int, out: int, channels: int, itemsize: int, kinds: int, whole: bool) -> dict[str, int]:
    """Returns the tile of a program, its warps and the depth of its pipeline; measured on an H200.

    Args:
        pixels: how many pixels the batch has.
        out, channels: output and input channels.
        itemsize: bytes of an element.
        kinds: of rows: 2 for a transposed convolution, else 1.
        whole: whether a program must have all output channels.
    """
    channels, out = (max(triton.next_power_of_2(each), 16) for each in (channels, out))
    n = min(out, 64)
    if triton.cdiv(pixels, 62) * triton.cdiv(out, n) * kinds < 1.5 * PROCESSORS:
        n, k = out if whole or out <= 32 else 16, min(channels, 128 // itemsize)
        # Four stages of 64 channels in fp32 would need more shared memory than sm_86 has.
        return {"PIXELS": 64, "N": n, "K": k, "num_warps": 4, "num_stages": 4 if n < 64 else 3}
    if n == 32 and itemsize == 2 and triton.cdiv(pixels, 126) * kinds >= 2 * PROCESSORS:
        return {"PIXELS": 128, "N": n, "K": min(channels, 32), "num_warps": 4, "num_stages": 3}
    return {"PIXELS": 64, "N": n, "K": min(channels, 128 // itemsize), "num_warps": 4, "num_stages": 3}


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    *,
    first: int = 0,
    transposed: bool = False,
    head: Tensor | None = None,
    products: Tensor | None = None,
    film: Tensor | None = None,
    precision: str,
) -> None:
    """Writes the activation to channels ``first``, ``first + 1``, ... of ``out``, or its products with ``head``.

    Args:
        x: ``[B, C, H, W]``, dense and channels last, like all images here.
        weight: contiguous ``[O, 3, 3, C]``, of x's dtype.
        bias: ``[O]``.
        first: the first channel of ``out`` that is written.
        out: ``[B, O', H, W]``, or of twice the size, or one row or column less than that, if transposed.
        transposed: whether to compute ``F.conv_transpose2d(x, weight.permute(3, 0, 1, 2), stride=2, padding=1)``.
        head: weights of the last convolution, contiguous ``[9 P, O]`` with `MAX_HEAD` and `MAX_HEAD_CHANNELS` as the
            most P and O, or None.
        products: with ``head`` and instead of ``out``: contiguous fp32 ``[9 P, B, H, W]``.
        film: fp32 ``[B, 2 O]`` with contiguous rows: of each image its scales - 1, then its shifts; or None.
        precision: "narrow", "tf32x3" or "tf32".
    """
    if not x.shape[0]:
        return
    batch, channels, height, width = x.shape
    pixels, kinds, count = batch * height * width, 2 if transposed else 1, 0 if head is None else len(head)
    config = launch_config(pixels, len(weight), channels, x.itemsize, kinds, head is not None)
    grid = (triton.cdiv(pixels, config["PIXELS"] - 2), triton.cdiv(len(weight), config["N"]), kinds)
    _, out_channels, out_height, out_width = (0, 0, 0, 0) if out is None else out.shape
    with on_device(x):
        convolution_kernel[grid](
            x,
            weight,
            bias,
            out,
            head,
            products,
            film,
            batch,
            HEIGHT=height,
            WIDTH=width,
            IN=channels,
            OUT=len(weight),
            OUT_HEIGHT=out_height,
            OUT_WIDTH=out_width,
            OUT_CHANNELS=out_channels,
            FIRST=first,
            TRANSPOSED=transposed,
            HEAD=count,
            FILM=0 if film is None else film.stride(0),
            H=max(triton.next_power_of_2(count), 16),
            PRECISION=precision,
            FAST=fast_math(x),
            **config,
        )
