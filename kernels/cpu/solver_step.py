"""One row of a solver's table (the twin of ``fastsde.reference.solver_step``)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import address, function

_MAX_SLOTS = 8
_FINITE = 2


class _Call(ctypes.Structure):
    """What a call is about; Step in solver_step.cpp has the same fields."""

    _fields_ = [
        ("slots", ctypes.c_void_p * _MAX_SLOTS),
        ("out", ctypes.c_void_p * _MAX_SLOTS),
        *((name, ctypes.c_void_p) for name in ("f", "f_uncond", "z", "keys", "k", "input")),
        *((name, ctypes.c_int64) for name in ("m", "row", "n", "size")),
        *((name, ctypes.c_float) for name in ("guidance", "clip")),
    ]


class Steps:
    """Rows of one table, for states of one shape: all that stays the same from row to row is looked at once.

    Args:
        table: contiguous fp32 ``[K, 2 + 5 m + m^2]``.
        shape: of a slot, ``(B, *shape)``.
        keys: contiguous int64 ``[B, 2]``, or None where every row's noise is given or zero.
        guidance, clip: numbers, or None.
    """

    def __init__(
        self,
        table: Tensor,
        shape: Sequence[int],
        *,
        keys: Tensor | None = None,
        guidance: float | None = None,
        clip: float | None = None,
    ) -> None:
        self._given = table, keys  # kept alive
        self._call = _Call(
            m=(math.isqrt(25 + 4 * (table.shape[1] - 2)) - 5) // 2,
            n=shape[0],
            size=math.prod(shape[1:]),
            guidance=0.0 if guidance is None else guidance,
            clip=math.inf if clip is None else clip,
        )
        self._slots, self._out = self._call.slots, self._call.out
        self._first, self._stride = address(table, torch.float32), 4 * table.shape[1]
        self._keys = None if keys is None else address(keys, torch.int64)
        self._is_empty = not math.prod(shape)
        self._reference = ctypes.byref(self._call)
        self._run = function("solver_step")

    def __call__(
        self,
        row: int,
        terms: Any,
        slots: Sequence[Tensor],
        f: Tensor,
        *,
        z: Tensor | None = None,
        f_uncond: Tensor | None = None,
        out: Sequence[Tensor | None],
        network_input: Tensor | None = None,
    ) -> int:
        """As `solver_step`. Slots, z and what is written to are contiguous fp32: they are not looked at again."""
        if self._is_empty:
            return _FINITE
        if f.dtype is not torch.float32 or not f.is_contiguous():
            f = f.float().contiguous()
        if f_uncond is not None and (f_uncond.dtype is not torch.float32 or not f_uncond.is_contiguous()):
            f_uncond = f_uncond.float().contiguous()
        call, given, made = self._call, self._slots, self._out
        for slot, is_read in enumerate(terms.read):
            new = out[slot]
            given[slot] = slots[slot].data_ptr() if is_read else None
            made[slot] = None if new is None else new.data_ptr()
        call.f = f.data_ptr()
        call.f_uncond = None if f_uncond is None else f_uncond.data_ptr()
        call.z = None if z is None else z.data_ptr()
        call.keys = self._keys if z is None and terms.has_noise else None
        call.k = self._first + row * self._stride
        call.input = None if network_input is None else network_input.data_ptr()
        call.row = row
        found: int = self._run(self._reference, torch.get_num_threads())
        return found


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
    out: Sequence[Tensor | None],
    network_input: Tensor | None = None,
) -> int:
    """Writes new slots to ``out``, where given; each may be one of ``slots``. All are contiguous ``[B, *shape]``.

    Args:
        slots: the m slots, fp32.
        f, f_uncond: fp32, bf16 or fp16.
        table: fp32 ``[K, 2 + 5 m + m^2]``.
        terms: which coefficients are zero, or one, in that row (`fastsde.solvers.Terms`).
        z: fp32.
        keys: int64 ``[B, 2]``, or None where the row has no noise or ``z`` is given.
        network_input: fp32, where the next row's n.s goes.

    Returns:
        What is not finite (`fastsde.kernels.status`): 0 for f, 1 for x'; 2 where all is.
    """
    for each in (*slots, *out, z, network_input):
        if each is not None:
            address(each, torch.float32)
    steps = Steps(table, slots[0].shape, keys=keys, guidance=guidance, clip=clip)
    return steps(row, terms, slots, f, z=z, f_uncond=f_uncond, out=out, network_input=network_input)
