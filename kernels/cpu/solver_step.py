"""One row of a solver's table (the twin of ``fastsde.reference.solver_step``)."""

from __future__ import annotations

import math

from torch import Tensor

from .library import call


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
    status: Tensor | None = None,
    out: Tensor,
    data: Tensor | None = None,
) -> None:
    """Writes x' to ``out`` and D to ``data``, where given. All tensors are contiguous ``[B, *shape]``.

    Args:
        x, history, z: fp32.
        f, f_uncond: fp32, bf16 or fp16.
        table: fp32 ``[K, 8]``.
        keys: int64 ``[B, 2]``, or None where the row has no noise or ``z`` is given.
        uses_data: of no account here: the row itself tells.
        status: int32 ``[1]``, lowered to 2 row + kind (`fastsde.kernels.status`) where f or x' is not finite.
        out, data: fp32; ``out`` may be ``x``, and ``data`` may be ``history``.
    """
    if not x.numel():
        return
    found = call(
        "solver_step",
        x,
        f.float(),
        None if f_uncond is None else f_uncond.float(),
        history,
        z,
        keys,
        table[row],
        row,
        0.0 if guidance is None else guidance,
        math.inf if clip is None else clip,
        len(x),
        x.numel() // len(x),
        out,
        data,
    )
    if status is not None and found < 2 * row + 2:
        status.clamp_(max=found)
