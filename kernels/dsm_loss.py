"""The loss of an objective, forward and backward (the twin of ``fastsde.reference.dsm_loss``):

    loss = mean of (w_f f + w_x x_0 + w_z z)^2,   d loss / d f = 2 w_f (w_f f + w_x x_0 + w_z z) / n

Both passes draw z again from the keys, so the noise is never stored; data with a coefficient of zero are not read. The
sum is taken in two stages, each in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .objective import W_F, W_X, W_Z, load_coefficient, load_data, load_step, training_noise
from .tile import WARPS, fast_math, on_device, program_slot, tile, tiling

_CHUNK = 1024  # partial sums that the second stage adds at a time


@triton.jit(do_not_specialize=["batch", "size", "count", "step"])
def dsm_loss_kernel(
    f_ptr,
    x_0_ptr,
    index_ptr,
    keys_ptr,
    table_ptr,
    z_ptr,
    step_ptr,
    grad_ptr,
    out_ptr,
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
    """Writes one partial sum per program (forward) or, if ``grad_ptr`` is given, the gradient of f (backward)."""
    step = load_step(step, step_ptr)
    sample, exists, start, element, offset, mask = tile(batch, size, S, P, ALIGNED, ROWS_FIRST)

    w_f = load_coefficient(table_ptr, sample, exists, W_F)
    w_x = load_coefficient(table_ptr, sample, exists, W_X)
    w_z = load_coefficient(table_ptr, sample, exists, W_Z)
    f = tl.load(f_ptr + offset, mask=mask & (w_f != 0.0)[:, None], other=0.0).to(tl.float32)
    x_0 = load_data(x_0_ptr, index_ptr, sample, exists, element, mask, w_x, size, count, scale, shift, ALIGNED)
    z = training_noise(z_ptr, keys_ptr, step, sample, exists, start, offset, mask, w_z, P, FAST)
    residual = w_f[:, None] * f + (w_x[:, None] * x_0 + w_z[:, None] * z)
    if grad_ptr is not None:
        grad = 2.0 * tl.load(grad_ptr) / (batch * size).to(tl.float32)
        tl.store(out_ptr + offset, (grad * w_f[:, None] * residual).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        squares = tl.where(mask, residual * residual, 0.0)
        tl.store(out_ptr + program_slot(), tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["count", "n"])
def mean_kernel(partial_ptr, out_ptr, count: tl.int64, n: tl.int64, CHUNK: tl.constexpr):
    """Adds ``count`` partial sums in one program and divides by ``n``: the second stage."""
    total = tl.zeros([CHUNK], tl.float32)
    lane = tl.arange(0, CHUNK)
    first = tl.zeros([], tl.int64)
    while first < count:
        total += tl.load(partial_ptr + first + lane, mask=first + lane < count, other=0.0)
        first += CHUNK
    tl.store(out_ptr, tl.sum(total, 0) / n.to(tl.float32))


def dsm_loss(
    f: Tensor,
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
    grad: Tensor | None = None,
    out: Tensor,
) -> None:
    """Writes the loss, fp32 ``[]``, to ``out``; if ``grad``, the gradient of the loss, is given, that of ``f`` instead.

    Args:
        f: contiguous fp32, bf16 or fp16 ``[B, *shape]``, not empty.
        x_0, index, scale, shift, keys, step, table, counter, z: as for `perturb`.
    """
    batch, size = len(f), f.numel() // len(f)
    constants, grid = tiling(batch, size)
    partial = f.new_empty(grid[0] * grid[1], dtype=table.dtype) if grad is None else out
    with on_device(f):
        dsm_loss_kernel[grid](
            f,
            x_0,
            index,
            keys,
            table,
            z,
            counter,
            grad,
            partial,
            scale,
            shift,
            batch,
            size,
            len(x_0),
            step,
            FAST=fast_math(f),
            **constants,
        )
        if grad is None:
            mean_kernel[(1,)](partial, out, len(partial), f.numel(), CHUNK=_CHUNK, num_warps=WARPS)
