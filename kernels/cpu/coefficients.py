"""The coefficients of an objective (the twin of ``fastsde.interpolation.Interpolation.at``)."""

from __future__ import annotations

from torch import Tensor

from .library import call


def coefficients(times: Tensor, rows: Tensor, first: int, shift: int, out: Tensor) -> int:
    """Writes the interpolated coefficients to ``out``, contiguous fp32 ``[n, 6]``; returns how many times lie outside.

    Args:
        times: contiguous fp32 ``[n]``.
        rows, first, shift: the attributes of the interpolation.
    """
    outside: int = call("coefficients", times, len(times), rows, len(rows), first, shift, out)
    return outside


def step_coefficients(
    keys: Tensor, step: int, low: float, span: float, rows: Tensor, first: int, shift: int, out: Tensor
) -> int:
    """Writes `coefficients` at the times low + span u of R steps from ``step`` on to ``out`` ``[R, n, 6]``.

    u are the uniforms of ``keys``, int64 ``[n, 2]``. Returns how many times lie outside.
    """
    given = (rows, len(rows), first, shift)
    outside: int = call("step_coefficients", keys, step, len(out), low, span, len(keys), *given, out)
    return outside
