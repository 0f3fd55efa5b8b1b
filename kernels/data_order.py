"""Which rows of the data each batch of consecutive steps takes (the twin of ``fastsde.reference.data_order``):

    index[r, i] = floor(u N),  u the uniform of position i in step ``step + r``, stream 3

The first step may come from a counter in device memory, so that one launch at the start of a captured graph draws the
order of all its steps. u is a multiple of 2^-24, or of 2^-48 for more than 2^24 rows, exact in float64; the product is
rounded once, as in the reference, so the result is exact for data of any size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .objective import load_step
from .philox import STREAM_DATA_ORDER, draw_offset, load_keys, philox
from .tile import GRID_AXIS_1, WARPS, on_device

BLOCK = 128


@triton.jit(do_not_specialize=["batch", "stride", "count", "step"])
def data_order_kernel(
    keys_ptr,
    step_ptr,
    out_ptr,
    batch: tl.int64,
    stride: tl.int64,
    count: tl.int64,
    step: tl.int64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = sample < batch
    seed, offset = load_keys(keys_ptr, sample, exists)
    word, more, _, _ = philox(seed, offset + draw_offset(load_step(step, step_ptr) + row, STREAM_DATA_ORDER))
    u = (word & 0xFFFFFF).to(tl.float64) * 2.0**-24
    if count > 2**24:
        u += (more & 0xFFFFFF).to(tl.float64) * 2.0**-48
    tl.store(out_ptr + row * stride + sample, (u * count.to(tl.float64)).to(tl.int64), mask=exists)


def data_order(keys: Tensor, step: int, n: int, *, counter: Tensor | None = None, out: Tensor) -> None:
    """Writes which rows of a data set of ``n`` rows are taken by ``R`` steps from ``step`` on.

    Args:
        keys: contiguous int64 ``[B, 2]``.
        counter: int64, one element on the device, added to the step.
        out: int64 ``[R, B]``, each row contiguous; R below 2^16.
    """
    steps, batch = out.shape
    if not out.numel():
        return
    if steps > GRID_AXIS_1 or out.stride(1) != 1:
        raise ValueError(f"out must have at most {GRID_AXIS_1} rows, each contiguous, got {steps} of {out.stride()}")
    grid = (triton.cdiv(batch, BLOCK), steps)
    with on_device(out):
        data_order_kernel[grid](keys, counter, out, batch, out.stride(0), n, step, BLOCK=BLOCK, num_warps=WARPS)
