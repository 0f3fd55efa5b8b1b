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
    """The arguments of a call; Step in solver_step.cpp has the same fields."""

    _fields_ = [
        ("slots", ctypes.c_void_p * _MAX_SLOTS),
        ("out", ctypes.c_void_p * _MAX_SLOTS),
        *((name, ctypes.c_void_p) for name in ("f", "f_uncond", "z", "sizes", "input", "keys")),
        *((name, ctypes.c_void_p) for name in ("table", "scale", "rates", "factor")),
        *((name, ctypes.c_int64) for name in ("m", "row", "n", "size")),
        ("clip", ctypes.c_float),
    ]


class Steps:
    """Steps of one table, for states of one shape. What stays the same from row to row is checked once.

    Args:
        table: contiguous fp32 ``[K, 2 + 5 m + m^2]``.
        slots: m.
        shape: of a slot, ``(B, *shape)``.
        keys: contiguous int64 ``[B, 2]``, or None if the noise of every row is given or zero.
        scale, rates, factor: contiguous fp32 ``[B]``, ``[K]`` and ``[B]``, for rows with an ``f_uncond``; without rates
            or factors these are 1.
        clip: a number, or None.
        threads: how many may work, by default as many as PyTorch would use.
    """

    def __init__(
        self,
        table: Tensor,
        slots: int,
        shape: Sequence[int],
        *,
        keys: Tensor | None = None,
        scale: Tensor | None = None,
        rates: Tensor | None = None,
        factor: Tensor | None = None,
        clip: float | None = None,
        threads: int | None = None,
    ) -> None:
        self._given, self._threads = (table, keys, scale, rates, factor), threads  # the tensors are kept alive
        weights = {"scale": scale, "rates": rates, "factor": factor}
        self._call = _Call(
            keys=None if keys is None else address(keys, torch.int64),
            table=address(table, torch.float32),
            m=slots,
            n=shape[0],
            size=math.prod(shape[1:]),
            **{name: None if each is None else address(each, torch.float32) for name, each in weights.items()},
            clip=math.inf if clip is None else clip,
        )
        self._slots, self._out = self._call.slots, self._call.out
        self._has_optional = False
        self._count = math.prod(shape)
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
        sizes: Tensor | None = None,
        out: Sequence[Tensor | None],
        network_input: Tensor | None = None,
    ) -> int:
        """Takes the step of a row, like `solver_step`; ``out`` and ``network_input`` are not checked.

        Raises:
            TypeError: for a slot or f that the network or a callback has changed in place, or a tensor without memory.
        """
        if not self._count:
            return _FINITE
        call, given, made, count = self._call, self._slots, self._out, self._count
        for slot, is_read in enumerate(terms.read):
            new, old = out[slot], slots[slot]
            if old.dtype is not torch.float32 or old.numel() != count or not old.is_contiguous():
                raise _changed(f"slot {slot}", old, count)
            given[slot] = old.data_ptr() if is_read else None
            made[slot] = None if new is None else new.data_ptr()
        if f.numel() != count:  # the network has resized its input in place
            raise _changed("the network's output", f, count)
        if f.dtype is not torch.float32 or not f.is_contiguous() or f.is_neg():
            f = f.float().contiguous().resolve_neg()
        call.f = f.data_ptr() or _without_memory(f)
        # Fields are set only if they may differ from the last row's: ctypes takes a tenth of a microsecond for each.
        if (
            self._has_optional
            or f_uncond is not None
            or z is not None
            or sizes is not None
            or network_input is not None
        ):
            self._has_optional = True
            f_uncond, z = _plain(f_uncond), _plain(z)
            call.f_uncond, call.z, call.input = _pointer(f_uncond), _pointer(z), _pointer(network_input)
            call.sizes = _pointer(sizes)
        call.row = row
        found: int = self._run(self._reference, self._threads or torch.get_num_threads())
        return found


def _plain(value: Tensor | None) -> Tensor | None:
    """Returns a value in contiguous fp32, with PyTorch's lazy negation (``is_neg``) carried out."""
    return None if value is None else value.float().contiguous().resolve_neg()


def _pointer(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr() or _without_memory(value)


def _changed(what: str, value: Tensor, count: int) -> TypeError:
    return TypeError(
        f"{what} must have {count} elements, and a slot must be contiguous torch.float32; got {value.dtype} "
        f"{list(value.shape)} of strides {value.stride()}: the network or a callback has changed its x in place"
    )


def _without_memory(value: Tensor) -> int:
    raise TypeError(
        f"a network's output, and noise, must be plain tensors with memory of their own, got a {type(value).__name__} "
        f"without memory"
    )


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
    out: Sequence[Tensor | None],
    network_input: Tensor | None = None,
) -> int:
    """Writes the new slots to those of ``out`` that are not None; each may be one of ``slots``.

    All are contiguous ``[B, *shape]``.

    Args:
        slots: the m slots, fp32.
        f, f_uncond: fp32, bf16 or fp16.
        table: fp32 ``[K, 2 + 5 m + m^2]``.
        terms: which coefficients are zero, or one, in that row (`fastsde.solvers.Terms`).
        z: like f.
        scale, rates, factor: as for `Steps`.
        sizes: contiguous fp32 ``[B, 2]``, what D and z are multiplied by in a Langevin row.
        keys: int64 ``[B, 2]``, or None if the row has no noise or ``z`` is given.
        network_input: fp32, where the next row's n.s is written.

    Returns:
        What is not finite (`fastsde.kernels.status`): 0 for f, 1 for x'; 2 if everything is finite.
    """
    for each in (*slots, *out, network_input):
        if each is not None:
            address(each, torch.float32)
    weights = {"scale": scale, "rates": rates, "factor": factor}
    steps = Steps(table, len(slots), slots[0].shape, keys=keys, clip=clip, **weights)
    return steps(row, terms, slots, f, z=z, f_uncond=f_uncond, sizes=sizes, out=out, network_input=network_input)
