"""Functions of time as piecewise cubics in fp32, exact to rounding, which a native kernel evaluates in nanoseconds.

The segments are runs of neighbouring fp32 numbers, so they are dense where t is small, as sigma(t) requires. The
leading bits of a time are the number of its segment, and t - middle is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Interpolation", "interpolate"]

_POWERS, _WIDTH = 4, 8  # as in kernels/cpu/objective.h
_MANTISSA_BITS = 23
_SEGMENT_BITS = range(4, 10)  # log2 of the number of segments per octave
_MOST_SEGMENTS = 1 << 14
_TOLERANCE = 1.25 * 2.0**-23  # two roundings, and the error of the cubic


class Interpolation(NamedTuple):
    """Piecewise cubics of up to 8 functions.

    Args:
        rows: fp32 ``[segments, 4, 8]``: for each segment the coefficients of 1, x, x^2 and x^3, with x = t - middle.
        first: the bits of the first fp32 number.
        shift: a segment has 2^shift fp32 numbers; the last one also includes the number after it.
    """

    rows: Tensor
    first: int
    shift: int

    def at(self, t: Tensor) -> Tensor:
        """Returns the values, fp32 ``[*t.shape, 8]``, at fp32 times that lie in the segments."""
        segment = ((t.view(torch.int32) - self.first) >> self.shift).clamp_(max=len(self.rows) - 1)
        row, x = self.rows[segment], (t - self._middle(segment))[..., None]
        return row[..., 0, :] + x * (row[..., 1, :] + x * (row[..., 2, :] + x * row[..., 3, :]))

    def _middle(self, segment: Tensor) -> Tensor:
        bits = self.first + (segment << self.shift) + (1 << (self.shift - 1))
        return bits.to(torch.int32).view(torch.float32)


def interpolate(table: Callable[[Tensor], Tensor], low: float, high: float) -> Interpolation | None:
    """Fits cubics through the values of a ``table`` at four points of each segment between two positive times.

    Args:
        table: maps float64 times ``[n]`` to float64 ``[n, at most 8]``.

    Returns:
        The interpolation with the fewest segments that is exact to rounding, or None if there is none.
    """
    bounds = torch.tensor([low, high], dtype=torch.float32, device="cpu").view(torch.int32).tolist()
    for bits in _SEGMENT_BITS:
        shift = _MANTISSA_BITS - bits
        first = bounds[0] >> shift << shift
        segments = max(1, -(-(bounds[1] - first) >> shift))
        if segments > _MOST_SEGMENTS:
            return None
        found = _fit(table, first, shift, segments)
        if found is not None:
            return found
    return None


def _fit(table: Callable[[Tensor], Tensor], first: int, shift: int, segments: int) -> Interpolation | None:
    empty = torch.zeros((segments, _POWERS, _WIDTH), dtype=torch.float32, device="cpu")
    result = Interpolation(empty, first, shift)
    starts = torch.arange(segments + 1, device="cpu").mul(1 << shift).add(first).int().view(torch.float32).double()
    middle, half = (starts[1:] + starts[:-1]) / 2, (starts[1:] - starts[:-1]) / 2
    angles = [math.pi * (2 * i + 1) / (2 * _POWERS) for i in range(_POWERS)]
    nodes = torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64, device="cpu")
    powers = torch.arange(_POWERS, dtype=torch.float64, device="cpu")
    values = table((middle[:, None] + half[:, None] * nodes).flatten()).reshape(segments, _POWERS, -1)
    cubic = torch.linalg.inv(nodes[:, None] ** powers) @ values
    result.rows[:, :, : values.shape[-1]] = (cubic / half[:, None, None] ** powers[:, None]).float()
    return result if _is_exact(result, table, middle, half) else None


def _is_exact(found: Interpolation, table: Callable[[Tensor], Tensor], middle: Tensor, half: Tensor) -> bool:
    """Returns whether errors between the nodes and at the ends are small relative to each segment's largest value."""
    places = torch.tensor([-1.0, -0.7, 0.0, 0.7, 0.99], dtype=torch.float64, device="cpu")
    times = (middle[:, None] + half[:, None] * places).float()
    exact = table(times.double().flatten()).reshape(*times.shape, -1)
    error = (found.at(times)[..., : exact.shape[-1]].double() - exact).abs()
    return bool((error <= _TOLERANCE * exact.abs().amax(1, keepdim=True)).all())
