"""Noising x_in = u_x x_0 + u_z z (the twin of ``fastsde.reference.perturb``).

The data are contiguous uint8 or float ``[N, *shape]``, gathered by an index if there is one; the noise is drawn in the
kernel or given. The result is contiguous fp32, bf16 or fp16 ``[B, *shape]``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .objective import TAU, U_X, U_Z, load_coefficient, load_data, load_step, training_noise
from .tile import fast_math, on_device, tile, tiling


@triton.jit(do_not_specialize=["batch", "size", "count", "step"])
def perturb_kernel(
    x_0_ptr,
    index_ptr,
    keys_ptr,
    table_ptr,
    z_ptr,
    step_ptr,
    x_in_ptr,
    tau_ptr,
    kept_ptr,
    scale,
    shift,
    batch: tl.int64,
    size: tl.int64,
    count: tl.int64,
    step: tl.int64,
    S: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    FAST: tl.constexpr,
):
    step = load_step(step, step_ptr)
    sample, exists, start, element, offset, mask = tile(batch, size, S, P, ALIGNED, ROWS_FIRST)

    if start == 0:
        tl.store(tau_ptr + sample, load_coefficient(table_ptr, sample, exists, TAU), mask=exists)
    u_x = load_coefficient(table_ptr, sample, exists, U_X)
    u_z = load_coefficient(table_ptr, sample, exists, U_Z)
    x_0 = load_data(x_0_ptr, index_ptr, sample, exists, element, mask, u_x, size, count, scale, shift, ALIGNED)
    z = training_noise(z_ptr, keys_ptr, step, sample, exists, start, offset, mask, u_z, P, FAST)
    if kept_ptr is not None:
        tl.store(kept_ptr + offset, z, mask=mask)
    x_in = u_x[:, None] * x_0 + u_z[:, None] * z
    tl.store(x_in_ptr + offset, x_in.to(x_in_ptr.dtype.element_ty), mask=mask)


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    table: Tensor,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    counter: Tensor | None = None,
    out: Tensor,
    tau: Tensor,
    kept: Tensor | None = None,
) -> None:
    """Writes x_in to ``out`` ``[B, *shape]`` and tau, fp32 ``[B]``.

    Args:
        step: the training step.
        table: the coefficients, contiguous fp32 ``[B, 6]``.
        counter: int64, one element on the device, added to the step.
        z: fp32 ``[B, *shape]``, or None to draw it.
        kept: fp32 ``[B, *shape]``, where the noise is written, or None.
    """
    batch = len(out)
    if not batch:
        return
    size = out.numel() // batch
    constants, grid = tiling(batch, size)
    with on_device(out):
        perturb_kernel[grid](
            x_0,
            index,
            keys,
            table,
            z,
            counter,
            out,
            tau,
            kept,
            scale,
            shift,
            batch,
            size,
            len(x_0),
            step,
            FAST=fast_math(out),
            **constants,
        )
