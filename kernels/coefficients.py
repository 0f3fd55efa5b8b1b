"""The coefficients of an objective at given times (the twin of ``fastsde.interpolation.Interpolation.at``).

The functions are piecewise cubics. A segment is a run of 2^shift consecutive fp32 numbers, so that the leading bits of
a time give the number of its segment:

    table[i, c] = r0 + x (r1 + x (r2 + x r3)),   r = rows[segment, :, c],   x = t - the middle of the segment
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tile import WARPS, on_device

BLOCK = 128
_POWERS, _WIDTH = tl.constexpr(4), tl.constexpr(8)


@triton.jit(do_not_specialize=["n", "segments", "first"])
def coefficients_kernel(
    times_ptr,
    rows_ptr,
    out_ptr,
    n: tl.int64,
    segments: tl.int64,
    first: tl.int64,
    SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < n
    t = tl.load(times_ptr + place, mask=exists, other=1.0)
    bits = t.to(tl.int32, bitcast=True) - first
    inside = (bits >= 0) & (bits <= segments << SHIFT)
    segment = tl.minimum(tl.maximum(bits >> SHIFT, 0), segments - 1)
    middle = (first + (segment << SHIFT) + (1 << (SHIFT - 1))).to(tl.int32).to(tl.float32, bitcast=True)
    x = tl.where(inside, t - middle, float("nan"))[:, None]
    column = tl.arange(0, _WIDTH)[None, :]
    row_ptr = rows_ptr + segment[:, None] * (_POWERS * _WIDTH) + column
    value = tl.load(row_ptr + 3 * _WIDTH)
    for power in tl.static_range(_POWERS - 2, -1, -1):
        value = value * x + tl.load(row_ptr + power * _WIDTH)
    mask = exists[:, None] & (column < COLUMNS)
    tl.store(out_ptr + place[:, None] * COLUMNS + column, value, mask=mask)


def coefficients(times: Tensor, rows: Tensor, first: int, shift: int, out: Tensor) -> int:
    """Writes the interpolated coefficients to ``out``, contiguous fp32 ``[n, columns]``; returns 0.

    Args:
        times: contiguous fp32 ``[n]``. Times outside of the segments get NaN.
        rows, first, shift: the attributes of the interpolation.
    """
    n, columns = out.shape
    if n:
        with on_device(out):
            coefficients_kernel[(triton.cdiv(n, BLOCK),)](
                times, rows, out, n, len(rows), first, SHIFT=shift, COLUMNS=columns, BLOCK=BLOCK, num_warps=WARPS
            )
    return 0
