"""The reverse SDE with adaptive steps, each sample with its own (`fastsde.solvers.GottaGoFast`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..sde import match_dims
from ..solvers.adaptive import GottaGoFast
from .errors import check_steps, out_of_steps
from .path import BrownianPath

__all__ = ["Drift", "Normal", "simulate", "three_bits"]

_LONGEST = 2.0**100  # where the error is 0
Drift = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Normal = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def simulate(
    drift: Drift, normal: Normal, x: Tensor, t_start: float, t_end: float, solver: GottaGoFast
) -> tuple[Tensor, Tensor]:
    """Simulates dx = drift dt + g dw backwards in time from ``t_start`` down to ``t_end``.

    All samples that have not finished take an attempt in each round, so that the number of the round is the number of
    each sample's own attempts, and the key and step of its noise do not depend on the batch. Step sizes have three
    significant bits, so that nor do they depend on its rounding errors, except next to a limit.

    Args:
        drift: called as ``drift(x, t, samples)`` with x ``[b, *shape]``, t float64 ``[b]`` and the indices int64
            ``[b]`` of the samples that have not finished; returns the drift ``[b, *shape]`` and g, float64 ``[b]``.
        normal: called as ``normal(samples, attempt)``; returns the noise of an attempt ``[b, *shape]``, in x's dtype.
        x: the state ``[B, *shape]`` at ``t_start``, fp32 or float64.

    Returns:
        The state at ``t_end`` ``[B, *shape]``, and how often ``drift`` was called for each sample, int64 ``[B]``.

    Raises:
        NonFiniteError: if the drift or the state becomes NaN or infinite.
        StepSizeError: if a sample needs more than ``max_steps`` attempts, or steps too short for float64 times.
    """
    x_end, calls = x.clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    samples = torch.arange(len(x), device=x.device)
    t = torch.full((len(x),), t_start, dtype=torch.float64, device=x.device)
    h, previous = torch.full_like(t, solver.h_init), x
    path = BrownianPath(x, solver.keeps_noise)

    def change(x: Tensor, t: Tensor, h: Tensor, dw: Tensor) -> Tensor:
        slope, g = drift(x, t, samples)
        return (_column(g, x) * dw).addcmul_(_column(h, x), slope, value=-1)

    for attempt in range(solver.max_steps):
        if not len(samples):
            return x_end, calls
        after = path.end_of_step((t - h).clamp_(min=t_end))
        h = t - after
        dw = path.increment(t, after, normal(samples, attempt))
        first = change(x, t, h, dw)
        euler = x + first
        correction = (change(euler, after, h, dw) - first).mul_(0.5)
        error = _norm(correction / _allowed(euler, previous, solver), solver.norm)
        check_steps(~torch.isfinite(error), t == after, samples, t, solver.rtol, solver.atol)
        accepted = error <= 1
        path.advance(t, after, dw, accepted)
        is_new = match_dims(accepted, x)
        x = torch.where(is_new, euler + correction if solver.extrapolate else euler, x)
        previous, t = torch.where(is_new, euler, previous), torch.where(accepted, after, t)
        h = three_bits(solver.safety * h * error**-solver.exponent)
        has_finished = accepted & (after == t_end)
        if has_finished.any():
            done, rest = samples[has_finished], (~has_finished).nonzero()[:, 0]
            x_end[done], calls[done] = x[has_finished], 2 * (attempt + 1)
            samples, x, previous, t, h = samples[rest], x[rest], previous[rest], t[rest], h[rest]
            path.keep(rest)
    if not len(samples):
        return x_end, calls
    raise out_of_steps(f"{solver.max_steps} steps (max_steps) were not enough", samples, t, solver.rtol, solver.atol)


def three_bits(h: Tensor) -> Tensor:
    """Returns positive step sizes, float64, rounded down to three significant bits.

    The noise of a step depends on its length. Were the lengths to follow the rounding errors of the network, these
    would grow along the trajectory until they change the sample.
    """
    h = h.clamp(max=_LONGEST)
    mantissa = torch.frexp(h).mantissa  # at least 1/2
    return h / mantissa * (8 * mantissa).floor() / 8


def _column(value: Tensor, x: Tensor) -> Tensor:
    return match_dims(value.to(x.dtype), x)


def _allowed(euler: Tensor, previous: Tensor, solver: GottaGoFast) -> Tensor:
    """Returns the error that each element is allowed."""
    return torch.maximum(euler.abs(), previous.abs()).mul_(solver.rtol).clamp_(min=solver.atol)


def _norm(scaled: Tensor, norm: str) -> Tensor:
    """Returns the norm of each sample, float64 ``[b]``."""
    flat = scaled[:, None].flatten(1)
    if norm == "linf":
        return flat.abs().amax(1).double()
    length: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return length.double() / math.sqrt(max(flat.shape[1], 1))
