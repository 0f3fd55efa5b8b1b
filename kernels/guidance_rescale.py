"""The factor of rescaled guidance (the twin of ``fastsde.reference.rescale_factor``), for each sample:

    c = phi std(f) / std(g) + 1 - phi,    g = f_uncond + w (f - f_uncond),    w = scale[b] rates[row]

The network's outputs are contiguous fp32, bf16 or fp16 ``[B, *shape]``. A program goes through its samples' elements
once, tile by tile, with the means and the sums of squared deviations so far (Chan, Golub & LeVeque 1983), in an order
that depends only on the size of a sample: equal inputs give equal bits, in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .solver_step import guided
from .tile import aligned_size, on_device, whole_samples


@triton.jit
def _with(mean, squares, x, mask, before, here):
    """Returns mean and sum of squared deviations ``[S]`` of ``before`` elements and ``here`` more, those of a tile."""
    mean_here = tl.sum(tl.where(mask, x, 0.0), 1) / here
    apart = tl.where(mask, x - mean_here[:, None], 0.0)
    shift, share = mean_here - mean, here / (before + here)
    return mean + shift * share, squares + tl.sum(apart * apart, 1) + shift * shift * (before * share)


@triton.jit(do_not_specialize=["batch", "size", "row"])
def rescale_kernel(
    f_ptr,
    f_uncond_ptr,
    scale_ptr,
    rates_ptr,
    counter_ptr,
    factor_ptr,
    phi,
    batch: tl.int64,
    size: tl.int64,
    row: tl.int64,
    S: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if counter_ptr is not None:
        row += tl.load(counter_ptr)
    sample = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    exists = sample < batch
    size = aligned_size(size, ALIGNED)
    mean_f = tl.zeros([S], tl.float32)
    squares_f, mean_g, squares_g = mean_f, mean_f, mean_f
    first = tl.zeros([], tl.int64)
    while first < size:
        element = first + tl.arange(0, 4 * P)
        mask = exists[:, None] & (element < size)[None, :]
        offset = sample[:, None] * size + element[None, :]
        f = tl.load(f_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        f_uncond = tl.load(f_uncond_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        g = guided(f, f_uncond, scale_ptr, rates_ptr, row, sample, exists)
        before, here = first.to(tl.float32), tl.minimum(size - first, 4 * P).to(tl.float32)
        mean_f, squares_f = _with(mean_f, squares_f, f, mask, before, here)
        mean_g, squares_g = _with(mean_g, squares_g, g, mask, before, here)
        first += 4 * P
    ratio = tl.sqrt(squares_f) / tl.sqrt(tl.where(squares_g > 0.0, squares_g, 1.0))
    factor = tl.where(squares_g > 0.0, phi * ratio + (1.0 - phi), 1.0)
    tl.store(factor_ptr + sample, factor, mask=exists)


def rescale_factor(
    f: Tensor,
    f_uncond: Tensor,
    row: int,
    *,
    scale: Tensor,
    rates: Tensor | None = None,
    phi: float,
    counter: Tensor | None = None,
    factor: Tensor,
) -> None:
    """Writes the factors of a batch to ``factor``, fp32 ``[B]``.

    Args:
        row, counter: as for `solver_step`, except that the counter is only read.
        scale, rates: fp32 ``[B]`` and ``[K]``; without rates these are 1.
    """
    if not f.numel():
        return
    batch, size = len(f), f.numel() // len(f)
    constants, grid = whole_samples(batch, size)
    with on_device(f):
        rescale_kernel[grid](f, f_uncond, scale, rates, counter, factor, float(phi), batch, size, row, **constants)
