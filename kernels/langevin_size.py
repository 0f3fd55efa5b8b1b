"""The sizes of the steps of a Langevin row (the twin of ``fastsde.reference.langevin_size``), for each sample:

    eps = min(2 (snr |z| / |g|)^2, eps_max),    g = D = p.s + q f with guidance,    or 0 where g is 0

`solver_step` multiplies D by eps and z by sqrt(2 eps), written to ``sizes``; in a row that is none, both are 1. The
noise is drawn again there instead of stored. A program goes through its samples' elements once, tile by tile, in an
order that depends only on the size of a sample: equal inputs give equal bits, in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .philox import STREAM_SAMPLING, tile_normal
from .solver_step import data_prediction, guided
from .tile import aligned_size, fast_math, on_device, whole_samples


@triton.jit(do_not_specialize=["batch", "size", "row"])
def langevin_size_kernel(
    slot_ptrs,
    f_ptr,
    f_uncond_ptr,
    z_ptr,
    keys_ptr,
    table_ptr,
    langevin_ptr,
    counter_ptr,
    scale_ptr,
    rates_ptr,
    factor_ptr,
    sizes_ptr,
    batch: tl.int64,
    size: tl.int64,
    row: tl.int64,
    S: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    KINDS: tl.constexpr,
    FAST: tl.constexpr,
):
    if counter_ptr is not None:
        row += tl.load(counter_ptr)
    row_ptr = table_ptr + row * (2 + 5 * M + M * M)
    snr, largest = tl.load(langevin_ptr + 2 * row), tl.load(langevin_ptr + 2 * row + 1)
    sample = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    exists = sample < batch
    size = aligned_size(size, ALIGNED)
    of_g = tl.zeros([S], tl.float32)
    of_z = of_g
    first = tl.where(snr > 0.0, tl.zeros([], tl.int64), size)  # in other rows there is nothing to do
    while first < size:
        element = first + tl.arange(0, 4 * P)
        mask = exists[:, None] & (element < size)[None, :]
        offset = sample[:, None] * size + element[None, :]
        slots = ()
        for i in tl.static_range(M):
            slots += (0.0 if slot_ptrs[i] is None else tl.load(slot_ptrs[i] + offset, mask=mask, other=0.0),)
        f = tl.load(f_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if f_uncond_ptr is not None:
            f_uncond = tl.load(f_uncond_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            f = guided(f, f_uncond, scale_ptr, rates_ptr, row, sample, exists)
            if factor_ptr is not None:
                f *= tl.load(factor_ptr + sample, mask=exists, other=0.0)[:, None]
        g = data_prediction(slots, f, row_ptr, None, M, KINDS)
        if z_ptr is not None:
            z = tl.load(z_ptr + offset, mask=mask, other=0.0)
        else:
            z = tile_normal(keys_ptr, sample, exists, first // 4, row + 1, STREAM_SAMPLING, P, FAST)
            z = tl.where(mask, z, 0.0)
        of_g += tl.sum(g * g, 1)
        of_z += tl.sum(z * z, 1)
        first += 4 * P
    eps = 2.0 * snr * snr * (of_z / tl.where(of_g > 0.0, of_g, 1.0))
    eps = tl.where(of_g > 0.0, tl.minimum(eps, largest), of_g)
    is_langevin = snr > 0.0
    tl.store(sizes_ptr + 2 * sample, tl.where(is_langevin, eps, 1.0), mask=exists)
    tl.store(sizes_ptr + 2 * sample + 1, tl.where(is_langevin, tl.sqrt(2.0 * eps), 1.0), mask=exists)


def langevin_size(
    slots: Sequence[Tensor],
    f: Tensor,
    table: Tensor,
    row: int,
    *,
    langevin: Tensor,
    terms: Any,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    scale: Tensor | None = None,
    rates: Tensor | None = None,
    factor: Tensor | None = None,
    counter: Tensor | None = None,
    sizes: Tensor,
) -> None:
    """Writes eps and sqrt(2 eps) of a batch to ``sizes``, fp32 ``[B, 2]``.

    Args:
        langevin: fp32 ``[K, 2]``: snr, 0 in rows that are no Langevin rows, and eps_max.
        slots, f, table, row, terms, z, keys, f_uncond, scale, rates, factor: as for `solver_step`.
        counter: as there, except that it is only read.
    """
    if not f.numel():
        return
    batch, size = len(f), f.numel() // len(f)
    constants, grid = whole_samples(batch, size)
    with on_device(f):
        langevin_size_kernel[grid](
            tuple(slot if kind else None for slot, kind in zip(slots, terms.p, strict=True)),
            f,
            f_uncond,
            z,
            keys if z is None else None,
            table,
            langevin,
            counter,
            scale,
            rates,
            factor,
            sizes,
            batch,
            size,
            row,
            M=len(slots),
            KINDS=terms.columns,
            FAST=fast_math(f),
            **constants,
        )
