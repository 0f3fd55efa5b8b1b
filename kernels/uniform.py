"""Uniforms of the noise contract (the twin of ``fastsde.noise.uniform``), one per key, for consecutive steps:

    out[r, i] = the uniform of key i in step ``step + r``

The first step may come from a counter in device memory, so that one launch at the start of a captured graph draws for
all its steps. u is a multiple of 2^-24, exact in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .objective import load_step
from .philox import draw_offset, load_keys
from .philox import uniform as uniform_of
from .tile import GRID_AXIS_1, WARPS, on_device

BLOCK = 128


@triton.jit(do_not_specialize=["batch", "stride", "step"])
def uniform_kernel(
    keys_ptr,
    step_ptr,
    out_ptr,
    batch: tl.int64,
    stride: tl.int64,
    step: tl.int64,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = sample < batch
    seed, offset = load_keys(keys_ptr, sample, exists)
    u = uniform_of(seed, offset + draw_offset(load_step(step, step_ptr) + row, STREAM))
    tl.store(out_ptr + row * stride + sample, u, mask=exists)


def uniform(keys: Tensor, step: int, stream: int, out: Tensor, *, counter: Tensor | None = None) -> None:
    """Writes the uniforms of ``R`` steps from ``step`` on.

    Args:
        keys: contiguous int64 ``[B, 2]``.
        counter: int64, one element on the device, added to the step.
        out: fp32 ``[R, B]``, each row contiguous; R below 2^16.
    """
    steps, batch = out.shape
    if not out.numel():
        return
    if steps > GRID_AXIS_1 or out.stride(1) != 1:
        raise ValueError(f"out must have at most {GRID_AXIS_1} rows, each contiguous, got {steps} of {out.stride()}")
    grid = (triton.cdiv(batch, BLOCK), steps)
    with on_device(out):
        uniform_kernel[grid](
            keys, counter, out, batch, out.stride(0), step, STREAM=stream, BLOCK=BLOCK, num_warps=WARPS
        )
