"""Denoising score matching, forward and backward (the twin of ``fastsde.reference.dsm_loss``):

    loss = mean of w(t) (f - target)^2,   d loss / d f = 2 w(t) (f - target) / n

with the target of the prediction kind: -z / sigma (score), z (eps), x_0 (x0) or alpha z - sigma x_0 (v). Both passes
draw z again from the keys, so that noise is never stored. The sum is taken in two stages, each in a fixed order: equal
inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .schedule import alpha_sigma, load_data, load_step, training_noise
from .tile import WARPS, fast_math, on_device, program_slot, tile, tiling

_CHUNK = 1024  # partial sums that the second stage adds at once


@triton.jit
def _residual(f, x_0, z, t, beta_min, beta_max, PREDICTION: tl.constexpr, WEIGHTING: tl.constexpr):
    """sqrt(w) (f - target) and sqrt(w), for t, alpha, sigma ``[S, 1]``."""
    alpha, sigma = alpha_sigma(t, beta_min, beta_max)
    alpha, sigma = alpha[:, None], sigma[:, None]
    if PREDICTION == "score":
        error, factor = f + z / sigma, sigma
    elif PREDICTION == "eps":
        error, factor = f - z, tl.full(sigma.shape, 1.0, tl.float32)
    elif PREDICTION == "x0":
        error, factor = f - x_0, alpha / sigma
    else:
        tl.static_assert(PREDICTION == "v", "an unknown prediction")
        error, factor = f - (alpha * z - sigma * x_0), alpha
    if WEIGHTING == "likelihood":
        factor *= tl.sqrt(beta_min + (beta_max - beta_min) * t)[:, None] / sigma
    elif WEIGHTING == "target":
        factor = tl.full(sigma.shape, 1.0, tl.float32)
    else:
        tl.static_assert(WEIGHTING == "sigma2", "an unknown weighting")
    return error * factor, factor


@triton.jit(do_not_specialize=["batch", "size", "count", "step"])
def dsm_loss_kernel(
    f_ptr,
    x_0_ptr,
    index_ptr,
    keys_ptr,
    t_ptr,
    z_ptr,
    step_ptr,
    grad_ptr,
    out_ptr,
    scale,
    shift,
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
    PREDICTION: tl.constexpr,
    WEIGHTING: tl.constexpr,
    FAST: tl.constexpr,
):
    """Forward: one partial sum a program. Backward, where ``grad_ptr`` is given: the gradient of f."""
    step = load_step(step, step_ptr)
    sample, exists, start, element, offset, mask = tile(batch, size, S, P, ALIGNED, ROWS_FIRST)

    f = tl.load(f_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + sample, mask=exists, other=1.0).to(tl.float32)
    x_0 = f
    if PREDICTION == "x0" or PREDICTION == "v":
        x_0 = load_data(x_0_ptr, index_ptr, sample, exists, element, mask, size, count, scale, shift, ALIGNED)
    z = f
    if PREDICTION != "x0":
        z = training_noise(z_ptr, keys_ptr, step, sample, exists, start, offset, mask, P, FAST)
    residual, factor = _residual(f, x_0, z, t, beta_min, beta_max, PREDICTION, WEIGHTING)
    if grad_ptr is not None:
        grad = 2.0 * tl.load(grad_ptr) / (batch * size).to(tl.float32)
        tl.store(out_ptr + offset, (grad * (factor * residual)).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        squares = tl.where(mask, residual * residual, 0.0)
        tl.store(out_ptr + program_slot(), tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["count", "n"])
def mean_kernel(partial_ptr, out_ptr, count: tl.int64, n: tl.int64, CHUNK: tl.constexpr):
    """The second stage: ``count`` partial sums, added by one program and divided by ``n``."""
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
    t: Tensor,
    keys: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    prediction: str = "score",
    weighting: str = "sigma2",
    counter: Tensor | None = None,
    grad: Tensor | None = None,
    out: Tensor,
) -> None:
    """Writes the loss, fp32 ``[]``, to ``out``; with the ``grad`` of the loss, the gradient of ``f`` instead.

    Args:
        f: contiguous fp32, bf16 or fp16 ``[B, *shape]``, not empty.
        x_0, index, scale, shift, keys, step, counter, z: as for `perturb`.
        t: ``[B]``.
    """
    batch, size = len(f), f.numel() // len(f)
    constants, grid = tiling(batch, size)
    partial = f.new_empty(grid[0] * grid[1], dtype=t.dtype) if grad is None else out
    with on_device(f):
        dsm_loss_kernel[grid](
            f,
            x_0,
            index,
            keys,
            t,
            z,
            counter,
            grad,
            partial,
            scale,
            shift,
            beta_min,
            beta_max,
            batch,
            size,
            len(x_0),
            step,
            PREDICTION=prediction,
            WEIGHTING=weighting,
            FAST=fast_math(f),
            **constants,
        )
        if grad is None:
            mean_kernel[(1,)](partial, out, len(partial), f.numel(), CHUNK=_CHUNK, num_warps=WARPS)
