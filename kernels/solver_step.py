"""One row of a solver's table (the twin of ``fastsde.reference.solver_step``):

    f  = f_uncond + w (f - f_uncond)    with guidance
    D  = p x + q f                      clamped to [-clip, clip] where there is a clip
    x' = a x + b f + e D + c H + d z

State, history and result are contiguous fp32 ``[B, *shape]``; the network's output is contiguous fp32, bf16 or fp16.
The table is fp32 ``[K, 8]``: time, a, b, c, d, e, p, q. Terms that a row has not are dropped at compile time. With
noise the kernel reads and writes 12 bytes an element, and nothing else limits it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .philox import STREAM_SAMPLING, tile_normal
from .tile import fast_math, on_device, program_slot, tile, tiling


@triton.jit
def _report(status_ptr, row, f, x_next, mask):
    """Lowers the status to the first row, and what in it, that is not finite."""
    limit = float("inf")  # NaN is not below it either
    kind = tl.where(tl.abs(f) < limit, tl.where(tl.abs(x_next) < limit, 2, 1), 0)
    kind = tl.min(tl.min(tl.where(mask, kind, 2), 1), 0)
    if kind < 2:
        tl.atomic_min(status_ptr, (2 * row).to(tl.int32) + kind)


@triton.jit
def _coefficient(table_ptr, row, NAME: tl.constexpr):
    return tl.load(table_ptr + row * 8 + NAME)


@triton.jit(do_not_specialize=["batch", "size", "row", "rows"])
def solver_step_kernel(
    x_ptr,
    f_ptr,
    f_uncond_ptr,
    history_ptr,
    z_ptr,
    keys_ptr,
    table_ptr,
    counter_ptr,
    time_ptr,
    status_ptr,
    out_ptr,
    data_ptr,
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
    USES_DATA: tl.constexpr,
    FAST: tl.constexpr,
):
    if counter_ptr is not None:
        slot = program_slot()
        count = tl.load(counter_ptr + slot)
        tl.debug_barrier()  # all threads have read the count before one of them moves it
        tl.store(counter_ptr + slot, count + 1)
        row += count
    sample, exists, start, _, offset, mask = tile(batch, size, S, P, ALIGNED, ROWS_FIRST)

    x = tl.load(x_ptr + offset, mask=mask)
    f = tl.load(f_ptr + offset, mask=mask).to(tl.float32)
    if f_uncond_ptr is not None:
        f_uncond = tl.load(f_uncond_ptr + offset, mask=mask).to(tl.float32)
        f = f_uncond + guidance * (f - f_uncond)
    x_next = _coefficient(table_ptr, row, 1) * x + _coefficient(table_ptr, row, 2) * f
    if USES_DATA or data_ptr is not None:
        data = _coefficient(table_ptr, row, 6) * x + _coefficient(table_ptr, row, 7) * f
        if clip is not None:
            data = tl.clamp(data, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
        if USES_DATA:
            x_next += _coefficient(table_ptr, row, 5) * data
    if history_ptr is not None:
        x_next += _coefficient(table_ptr, row, 3) * tl.load(history_ptr + offset, mask=mask)
    if data_ptr is not None:  # after H is read, in whose place D may go
        tl.store(data_ptr + offset, data, mask=mask)
    if z_ptr is not None:
        x_next += _coefficient(table_ptr, row, 4) * tl.load(z_ptr + offset, mask=mask)
    elif keys_ptr is not None:
        z = tile_normal(keys_ptr, sample, exists, start, row + 1, STREAM_SAMPLING, P, FAST)
        x_next += _coefficient(table_ptr, row, 4) * z
    tl.store(out_ptr + offset, x_next, mask=mask)
    if status_ptr is not None:
        _report(status_ptr, row, f, x_next, mask)
    if time_ptr is not None and start == 0:
        time = _coefficient(table_ptr, tl.minimum(row + 1, rows - 1), 0)
        tl.store(time_ptr + sample, tl.zeros_like(sample).to(tl.float32) + time, mask=exists)


def counter_slots(batch: int, size: int) -> int:
    """How many slots a device step counter has: one a program, so that each moves its own."""
    rows, columns = tiling(batch, size).grid
    return rows * columns


def solver_step(
    x: Tensor,
    f: Tensor,
    table: Tensor,
    row: int,
    *,
    history: Tensor | None = None,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | None = None,
    clip: float | None = None,
    uses_data: bool = False,
    counter: Tensor | None = None,
    time: Tensor | None = None,
    status: Tensor | None = None,
    out: Tensor,
    data: Tensor | None = None,
) -> None:
    """Writes x' to ``out`` (which may be ``x``) and, where given, D to ``data`` (which may be ``history``).

    Args:
        table: fp32 ``[K, 8]`` on the device.
        row: the row, or with a ``counter`` what is added to it.
        history: H, for rows with c; z, or keys int64 ``[B, 2]``, for rows with d.
        uses_data: whether e is not zero.
        counter: int64 ``[counter_slots(...)]``, all equal: the row, which the kernel moves on by one.
        time: fp32 ``[B]``, set to the time of the next row (in the last row, to its own).
        status: int32 ``[1]``, lowered to 2 row + kind (`fastsde.kernels.status`) for the first f or x' that is not
            finite.
    """
    batch = len(x)
    size = x.numel() // batch if batch else 0
    if not x.numel():
        return
    constants, grid = tiling(batch, size)
    with on_device(x):
        solver_step_kernel[grid](
            x,
            f,
            f_uncond,
            history,
            z,
            keys,
            table,
            counter,
            time,
            status,
            out,
            data,
            None if guidance is None else float(guidance),  # an int would be a type, and a variant, of its own
            None if clip is None else float(clip),
            batch,
            size,
            row,
            len(table),
            USES_DATA=uses_data,
            FAST=fast_math(x),
            **constants,
        )
