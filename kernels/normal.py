"""Standard normals of the noise contract for a batch ``[B, *shape]`` (the twin of ``fastsde.noise.normal``).

The result is contiguous fp32. The draw of a sample depends only on its key, the step and the stream.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .philox import tile_normal
from .tile import fast_math, on_device, tile, tiling


@triton.jit(do_not_specialize=["batch", "size", "step"])
def normal_kernel(
    keys_ptr,
    out_ptr,
    batch: tl.int64,
    size: tl.int64,
    step: tl.int64,
    STREAM: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    FAST: tl.constexpr,
):
    sample, exists, start, _, offset, mask = tile(batch, size, S, P, ALIGNED, ROWS_FIRST)
    z = tile_normal(keys_ptr, sample, exists, start, step, STREAM, P, FAST)
    tl.store(out_ptr + offset, z, mask=mask)


def normal(keys: Tensor, step: int, stream: int, out: Tensor) -> None:
    """Writes the draw of a step to ``out``, for keys int64 ``[B, 2]``."""
    if not out.numel():
        return
    batch = len(out)
    size = out.numel() // batch
    constants, grid = tiling(batch, size)
    with on_device(out):
        normal_kernel[grid](keys, out, batch, size, step, STREAM=stream, FAST=fast_math(out), **constants)
