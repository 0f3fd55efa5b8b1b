"""One row of a solver's table (the twin of ``fastsde.reference.solver_step``):

    f  = f_uncond + w (f - f_uncond)    with guidance
    D  = p.s + q f                      clamped to [-clip, clip] where there is a clip
    s' = A s + b f + e D + d z

Slots and results are contiguous fp32 ``[B, *shape]``; the network's output is contiguous fp32, bf16 or fp16. A row of
the table of m slots is fp32 ``[2 + 5 m + m^2]``: time, q, n, p, b, e, d, A. Terms that are absent are dropped at
compile time, and a slot that takes over another one is the caller's to rename. With one slot and noise the kernel reads
and writes 12 bytes an element, and nothing else limits it.
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
def plus(total, KIND: tl.constexpr, coefficient_ptr, value):
    """total + coefficient value, where a coefficient of KIND 0 is absent and one of KIND 1 is 1; total may be None."""
    if KIND == 0:
        return total
    else:
        tl.static_assert(KIND == 1 or KIND == 2)
        term = value if KIND == 1 else tl.load(coefficient_ptr) * value
        return term if total is None else total + term


@triton.jit
def data_prediction(slots, f, row_ptr, clip, M: tl.constexpr, Q: tl.constexpr, P: tl.constexpr):
    """D = p.s + q f, clamped where there is a clip."""
    data = plus(None, Q, row_ptr + 1, f)
    for i in tl.static_range(M):
        data = plus(data, P[i], row_ptr + 2 + M + i, slots[i])
    if data is None:
        data = tl.zeros_like(f)
    if clip is not None:
        data = tl.clamp(data, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    return data


@triton.jit
def new_slot(slots, f, data, z, row_ptr, M: tl.constexpr, J: tl.constexpr, TERMS: tl.constexpr):
    """A s + b f + e D + d z of slot J; TERMS are the kinds of A, b, e and d."""
    total = None
    for i in tl.static_range(M):
        total = plus(total, TERMS[0][J][i], row_ptr + 2 + (5 + J) * M + i, slots[i])
    total = plus(total, TERMS[1][J], row_ptr + 2 + 2 * M + J, f)
    total = plus(total, TERMS[2][J], row_ptr + 2 + 3 * M + J, data)
    total = plus(total, TERMS[3][J], row_ptr + 2 + 4 * M + J, z)
    return tl.zeros_like(f) if total is None else total


@triton.jit
def _report(status_ptr, row, f, x_next, mask):
    """Lowers the status to the first row, and what in it, that is not finite."""
    limit = float("inf")  # NaN is not below it either
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
    guidance,
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
    DATA: tl.constexpr,
    TERMS: tl.constexpr,
    INPUT: tl.constexpr,
    FAST: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 + 5 * M + M * M
    if counter_ptr is not None:
        slot = program_slot()
        count = tl.load(counter_ptr + slot)
        tl.debug_barrier()  # all threads have read the count before one of them moves it
        tl.store(counter_ptr + slot, count + 1)
        row += count
    sample, exists, start, _, offset, mask = tile(batch, size, S, P, ALIGNED, ROWS_FIRST)
    row_ptr = table_ptr + row * WIDTH

    slots = ()
    for i in tl.static_range(M):
        slots += (None if slot_ptrs[i] is None else tl.load(slot_ptrs[i] + offset, mask=mask),)
    f = tl.load(f_ptr + offset, mask=mask).to(tl.float32)
    if f_uncond_ptr is not None:
        f_uncond = tl.load(f_uncond_ptr + offset, mask=mask).to(tl.float32)
        f = f_uncond + guidance * (f - f_uncond)
    data = None
    if DATA is not None:
        data = data_prediction(slots, f, row_ptr, clip, M, DATA[0], DATA[1])
    z = None
    if z_ptr is not None:
        z = tl.load(z_ptr + offset, mask=mask)
    elif keys_ptr is not None:
        z = tile_normal(keys_ptr, sample, exists, start, row + 1, STREAM_SAMPLING, P, FAST)
    next_row_ptr = table_ptr + tl.minimum(row + 1, rows - 1) * WIDTH
    network_input = None
    for j in tl.static_range(M):
        if out_ptrs[j] is not None or (INPUT is not None and INPUT[j] != 0) or (j == 0 and status_ptr is not None):
            new = new_slot(slots, f, data, z, row_ptr, M, j, TERMS)
            if out_ptrs[j] is not None:  # after all slots are read, in whose place it may go
                tl.store(out_ptrs[j] + offset, new, mask=mask)
            if INPUT is not None:
                network_input = plus(network_input, INPUT[j], next_row_ptr + 2 + j, new)
            if j == 0 and status_ptr is not None:
                _report(status_ptr, row, f, new, mask)
    if INPUT is not None:
        tl.store(input_ptr + offset, network_input, mask=mask)
    if time_ptr is not None and start == 0:
        time = tl.load(next_row_ptr)
        tl.store(time_ptr + sample, tl.zeros_like(sample).to(tl.float32) + time, mask=exists)


def counter_slots(batch: int, size: int) -> int:
    """How many slots a device step counter has: one a program, so that each moves its own."""
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
    guidance: float | None = None,
    clip: float | None = None,
    counter: Tensor | None = None,
    time: Tensor | None = None,
    status: Tensor | None = None,
    out: Sequence[Tensor | None],
    network_input: Tensor | None = None,
) -> None:
    """Writes new slots to ``out``, where given; each may be one of ``slots``.

    Args:
        slots: the m slots.
        table: fp32 ``[K, 2 + 5 m + m^2]`` on the device.
        row: the row, or with a ``counter`` what is added to it.
        terms: which coefficients are zero, or one, in that row (`fastsde.solvers.Terms`).
        z: fp32, or keys int64 ``[B, 2]``, for rows with d.
        counter: int64 ``[counter_slots(...)]``, all equal: the row, which the kernel moves on by one.
        time: fp32 ``[B]``, set to the time of the next row (in the last row, to its own).
        status: int32 ``[1]``, lowered to 2 row + kind (`fastsde.kernels.status`) for the first f or x' that is not
            finite.
        network_input: fp32, where the next row's n.s goes.
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
            None if guidance is None else float(guidance),  # an int would be a type, and a variant, of its own
            None if clip is None else float(clip),
            batch,
            size,
            row,
            len(table),
            M=len(slots),
            DATA=(terms.q, terms.p) if terms.has_data else None,
            TERMS=(terms.A, terms.b, terms.e, terms.d),
            INPUT=None if network_input is None else terms.n,
            FAST=fast_math(x),
            **constants,
        )
