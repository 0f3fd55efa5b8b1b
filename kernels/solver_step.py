"""One row of a solver's table (the twin of ``fastsde.reference.solver_step``):

    f  = c (f_uncond + w (f - f_uncond))    with guidance, w = scale[b] rates[row] and c = factor[b] of sample b
    D  = p.s + q f                      clamped to [-clip, clip] if there is a clip
    s' = A s + b f + e D + d z          in a Langevin row with eps D and sqrt(2 eps) z, of sizes[b]

Slots and results are contiguous fp32 ``[B, *shape]``; the network's output is contiguous fp32, bf16 or fp16. A row of
a table of m slots is fp32 ``[2 + 5 m + m^2]``: time, q, n, p, b, e, d, A. Terms that are absent are dropped at compile
time, and a slot that takes over another one is left to the caller to rename. With one slot and noise the kernel reads
and writes 12 bytes per element, and only this memory traffic limits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .philox import STREAM_SAMPLING, tile_normal
from .tile import fast_math, on_device, program_slot, tile, tiling


@triton.jit
def guided(f, f_uncond, scale_ptr, rates_ptr, row, sample, exists):
    """Returns f_uncond + w (f - f_uncond) for samples ``[S]``, with w = scale rates[row]; rates may be None, for 1."""
    w = tl.load(scale_ptr + sample, mask=exists, other=0.0)
    if rates_ptr is not None:
        w *= tl.load(rates_ptr + row)
    return f_uncond + w[:, None] * (f - f_uncond)


@triton.jit
def plus(total, KINDS: tl.constexpr, COLUMN: tl.constexpr, row_ptr, value):
    """Returns total + coefficient value, for a column of the row that is not absent; total may be None."""
    term = value if KINDS[COLUMN] == 1 else tl.load(row_ptr + COLUMN) * value
    return term if total is None else total + term


@triton.jit
def data_prediction(slots, f, row_ptr, clip, M: tl.constexpr, KINDS: tl.constexpr):
    """Returns D = p.s + q f, clamped if there is a clip."""
    data = None
    for i in tl.static_range(M):
        if KINDS[2 + M + i] != 0:
            data = plus(data, KINDS, 2 + M + i, row_ptr, slots[i])
    if KINDS[1] != 0:
        data = plus(data, KINDS, 1, row_ptr, f)
    if data is None:
        data = tl.zeros_like(f)
    if clip is not None:
        data = tl.clamp(data, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    return data


@triton.jit
def new_slot(new, slots, f, data, z, row_ptr, M: tl.constexpr, J: tl.constexpr, KINDS: tl.constexpr):
    """Returns A s + b f + e D + d z for slot J, plus ``new`` if that is not None."""
    for i in tl.static_range(M):
        if KINDS[2 + (5 + J) * M + i] != 0:
            new = plus(new, KINDS, 2 + (5 + J) * M + i, row_ptr, slots[i])
    if KINDS[2 + 2 * M + J] != 0:
        new = plus(new, KINDS, 2 + 2 * M + J, row_ptr, f)
    if KINDS[2 + 3 * M + J] != 0:
        new = plus(new, KINDS, 2 + 3 * M + J, row_ptr, data)
    if KINDS[2 + 4 * M + J] != 0:
        new = plus(new, KINDS, 2 + 4 * M + J, row_ptr, z)
    return tl.zeros_like(f) if new is None else new


@triton.jit
def _report(status_ptr, row, f, x_next, mask):
    """Lowers the status to 2 row + kind if f or the new state is not finite, so that the first such row remains."""
    limit = float("inf")  # NaN compares as not below it
    kind = tl.where(tl.abs(f) < limit, tl.where(tl.abs(x_next) < limit, 2, 1), 0)
    kind = tl.min(tl.min(tl.where(mask, kind, 2), 1), 0)
    if kind < 2:
        tl.atomic_min(status_ptr, (2 * row).to(tl.int32) + kind)


@triton.jit(do_not_specialize=["batch", "size", "row", "rows"])
def solver_step_kernel(
    slot_ptrs,
    f_ptr,
    f_uncond_ptr,
    z_ptr,
    keys_ptr,
    table_ptr,
    counter_ptr,
    time_ptr,
    status_ptr,
    out_ptrs,
    input_ptr,
    scale_ptr,
    rates_ptr,
    factor_ptr,
    sizes_ptr,
    clip,
    batch: tl.int64,
    size: tl.int64,
    row: tl.int64,
    rows: tl.int64,
    S: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    M: tl.constexpr,
    KINDS: tl.constexpr,
    HAS_DATA: tl.constexpr,
    FAST: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 + 5 * M + M * M
    if counter_ptr is not None:
        slot = program_slot()
        count = tl.load(counter_ptr + slot)
        tl.debug_barrier()  # all threads must have read the count before one of them advances it
        tl.store(counter_ptr + slot, count + 1)
        row += count
    sample, exists, start, _, offset, mask = tile(batch, size, S, P, ALIGNED, ROWS_FIRST)
    row_ptr = table_ptr + row * WIDTH

    slots = ()
    for i in tl.static_range(M):
        # 0.0 stands for a slot that is not read: compiled tuples that grow cannot hold None.
        slots += (0.0 if slot_ptrs[i] is None else tl.load(slot_ptrs[i] + offset, mask=mask),)
    f = tl.load(f_ptr + offset, mask=mask).to(tl.float32)
    if f_uncond_ptr is not None:
        f_uncond = tl.load(f_uncond_ptr + offset, mask=mask).to(tl.float32)
        f = guided(f, f_uncond, scale_ptr, rates_ptr, row, sample, exists)
        if factor_ptr is not None:
            f *= tl.load(factor_ptr + sample, mask=exists, other=0.0)[:, None]
    data = None
    if HAS_DATA:
        data = data_prediction(slots, f, row_ptr, clip, M, KINDS)
    z = None
    if z_ptr is not None:
        z = tl.load(z_ptr + offset, mask=mask)
    elif keys_ptr is not None:
        z = tile_normal(keys_ptr, sample, exists, start, row + 1, STREAM_SAMPLING, P, FAST)
    if sizes_ptr is not None:
        data *= tl.load(sizes_ptr + 2 * sample, mask=exists, other=0.0)[:, None]
        z *= tl.load(sizes_ptr + 2 * sample + 1, mask=exists, other=0.0)[:, None]
    next_row_ptr = table_ptr + tl.minimum(row + 1, rows - 1) * WIDTH
    network_input = None
    for j in tl.static_range(M):
        if (
            out_ptrs[j] is not None
            or (input_ptr is not None and KINDS[2 + j] != 0)
            or (j == 0 and status_ptr is not None)
        ):
            new = new_slot(None, slots, f, data, z, row_ptr, M, j, KINDS)
            if out_ptrs[j] is not None:  # may overwrite a slot: all slots have been read by now
                tl.store(out_ptrs[j] + offset, new, mask=mask)
            if input_ptr is not None and KINDS[2 + j] != 0:
                network_input = plus(network_input, KINDS, 2 + j, next_row_ptr, new)
            if j == 0 and status_ptr is not None:
                _report(status_ptr, row, f, new, mask)
    if input_ptr is not None:
        tl.store(input_ptr + offset, network_input, mask=mask)
    if time_ptr is not None and start == 0:
        time = tl.load(next_row_ptr)
        tl.store(time_ptr + sample, tl.zeros_like(sample).to(tl.float32) + time, mask=exists)


def counter_slots(batch: int, size: int) -> int:
    """Returns the size of a step counter on the device: one element per program, so that each advances its own."""
    rows, columns = tiling(batch, size).grid
    return rows * columns


def solver_step(
    slots: Sequence[Tensor],
    f: Tensor,
    table: Tensor,
    row: int,
    *,
    terms: Any,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    scale: Tensor | None = None,
    rates: Tensor | None = None,
    factor: Tensor | None = None,
    sizes: Tensor | None = None,
    clip: float | None = None,
    counter: Tensor | None = None,
    time: Tensor | None = None,
    status: Tensor | None = None,
    out: Sequence[Tensor | None],
    network_input: Tensor | None = None,
) -> None:
    """Writes the new slots to those of ``out`` that are not None; each may be one of ``slots``.

    Args:
        slots: the m slots.
        table: fp32 ``[K, 2 + 5 m + m^2]`` on the device.
        row: the row, or with a ``counter`` the number that is added to it.
        terms: which coefficients are zero, or one, in that row (`fastsde.solvers.Terms`).
        z, keys: for rows with noise, z fp32, or keys int64 ``[B, 2]`` to draw it.
        scale, rates, factor: fp32 ``[B]``, ``[K]`` and ``[B]``, for rows with an ``f_uncond``; without rates or factors
            these are 1.
        sizes: fp32 ``[B, 2]``, what D and z are multiplied by in a Langevin row (`langevin_size`).
        counter: int64 ``[counter_slots(...)]``, all equal: the row, which the kernel advances by one.
        time: fp32 ``[B]``, set to the time of the next row (in the last row, to its own).
        status: int32 ``[1]``, lowered to 2 row + kind (`fastsde.kernels.status`) for the first f or x' that is not
            finite.
        network_input: fp32, where the next row's n.s is written.
    """
    x = slots[0]
    batch = len(x)
    size = x.numel() // batch if batch else 0
    if not x.numel():
        return
    constants, grid = tiling(batch, size)
    with on_device(x):
        solver_step_kernel[grid](
            tuple(each if read else None for each, read in zip(slots, terms.read, strict=True)),
            f,
            f_uncond,
            z,
            keys,
            table,
            counter,
            time,
            status,
            tuple(out),
            network_input,
            scale,
            rates,
            factor,
            sizes,
            None if clip is None else float(clip),  # an int would compile another variant
            batch,
            size,
            row,
            len(table),
            M=len(slots),
            KINDS=terms.columns,
            HAS_DATA=terms.has_data,
            FAST=fast_math(x),
            **constants,
        )
