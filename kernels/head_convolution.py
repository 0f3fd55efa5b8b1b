"""The U-Net's last convolution, 3x3 to the 1 to 4 channels of an image, from products that the layer before has made:

    out[b, o, i, j] = bias[o] + sum over di, dj of products[9 o + 3 di + dj, b, i + di - 1, j + dj - 1]

`convolution` multiplies each pixel by the weights of all taps while it is on the chip, so that the 32 or more channels
of the pixel are never written to memory; nine sums of them are. They are fp32, and contiguous, as is out. One launch,
limited by the nine values read per output, most of them from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tile import WARPS, on_device

_ELEMENTS = 256  # pixels per program


@triton.jit(do_not_specialize=["batch"])
def head_convolution_kernel(
    products_ptr,
    bias_ptr,
    out_ptr,
    batch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    plane: tl.constexpr = HEIGHT * WIDTH
    pixel = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    sample, place = pixel // plane, pixel % plane
    row, column = place // WIDTH, place % WIDTH
    real = sample < batch
    size = batch.to(tl.int64) * plane
    o = tl.program_id(1)
    total = tl.zeros((ELEMENTS,), tl.float32) + tl.load(bias_ptr + o).to(tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            above, beside = row + (i - 1), column + (j - 1)
            inside = real & (above >= 0) & (above < HEIGHT) & (beside >= 0) & (beside < WIDTH)
            source = (9 * o + (3 * i + j)) * size + (pixel + ((i - 1) * WIDTH + (j - 1)))
            total += tl.load(products_ptr + source, mask=inside, other=0.0)
    to = (sample.to(tl.int64) * OUT + o) * plane + place
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=real)


def head_convolution(products: Tensor, bias: Tensor, out: Tensor) -> None:
    """Writes the sums to ``out``.

    Args:
        products: contiguous fp32 ``[9 O, B, H, W]``.
        bias: ``[O]``.
        out: contiguous ``[B, O, H, W]``.
    """
    if not out.numel():
        return
    batch, channels, height, width = out.shape
    with on_device(out):
        head_convolution_kernel[(triton.cdiv(batch * height * width, _ELEMENTS), channels)](
            products,
            bias,
            out,
            batch,
            HEIGHT=height,
            WIDTH=width,
            OUT=channels,
            ELEMENTS=_ELEMENTS,
            num_warps=WARPS,
        )
