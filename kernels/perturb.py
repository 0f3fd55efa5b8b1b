"""Posterior noising x_t = alpha(t) x_0 + sigma(t) z (the twin of ``fastsde.reference.perturb``).

The data are contiguous uint8 or float ``[N, *shape]``, gathered by an index where there is one; times and noise are
drawn in the kernel or given. The result is contiguous fp32 or bf16 ``[B, *shape]``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .philox import STREAM_TRAINING_TIME, draw_offset, load_keys, uniform
from .schedule import alpha_sigma, load_data, load_step, training_noise
from .tile import fast_math, on_device, tile, tiling


@triton.jit(do_not_specialize=["batch", "size", "count", "step"])
def perturb_kernel(
    x_0_ptr,
    index_ptr,
    keys_ptr,
    t_ptr,
    z_ptr,
    step_ptr,
    x_t_ptr,
    t_out_ptr,
    scale,
    shift,
    t_min,
    beta_min,
    beta_max,
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

    if t_ptr is not None:
        t = tl.load(t_ptr + sample, mask=exists, other=1.0).to(tl.float32)
    else:
        seed, first = load_keys(keys_ptr, sample, exists)
        t = t_min + (1.0 - t_min) * uniform(seed, first + draw_offset(step, STREAM_TRAINING_TIME))
    if start == 0:
        tl.store(t_out_ptr + sample, t, mask=exists)
    alpha, sigma = alpha_sigma(t, beta_min, beta_max)
    x_0 = load_data(x_0_ptr, index_ptr, sample, exists, element, mask, size, count, scale, shift, ALIGNED)
    z = training_noise(z_ptr, keys_ptr, step, sample, exists, start, offset, mask, P, FAST)
    x_t = alpha[:, None] * x_0 + sigma[:, None] * z
    tl.store(x_t_ptr + offset, x_t.to(x_t_ptr.dtype.element_ty), mask=mask)


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    t: Tensor | None = None,
    z: Tensor | None = None,
    t_min: float = 1e-4,
    counter: Tensor | None = None,
    out: Tensor,
    t_out: Tensor,
) -> None:
    """Writes x_t to ``out`` ``[B, *shape]`` and the times to ``t_out`` fp32 ``[B]``.

    Args:
        step: the training step.
        counter: int64, one element on the device, that is added to the step.
        t: fp32 ``[B]``, or None to draw them on [t_min, 1].
        z: fp32 ``[B, *shape]``, or None to draw it.
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
            t,
            z,
            counter,
            out,
            t_out,
            scale,
            shift,
            t_min,
            beta_min,
            beta_max,
            batch,
            size,
            len(x_0),
            step,
            FAST=fast_math(out),
            **constants,
        )
