"""The times of a trajectory, by the name of their spacing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..sde import Process
from ..validation import check_number
from ..vocabulary import SPACINGS
from .forms import float64

__all__ = ["spaced", "time_of"]

_MAX = 80.0  # EDM's sigma_max
_DISCRETE = 1000  # steps of the discrete schedule


def spaced(
    spacing: str, sde: Process, intervals: int, t_start: float, t_end: float, rho: float | None = None
) -> Tensor:
    """Returns times ``[intervals + 1]`` of a process, from ``t_start`` down to ``t_end``, or up, in reverse.

    Args:
        spacing: "uniform" in t; "quadratic", uniform in sqrt(t) (DDIM, arXiv:2010.02502); "karras", uniform in
            (sigma / alpha)^(1 / rho) (EDM, arXiv:2206.00364, eq. 5); "log_snr", uniform in log(alpha / sigma)
            (DPM-Solver, arXiv:2206.00927); or "trailing" and "leading", times of a discrete schedule of 1000 steps
            (Lin et al. 2024, arXiv:2305.08891, table 2), where "leading" starts below ``t_start``. If sigma is 0 at
            t_end, the last interval of "karras" and "log_snr" starts at the process's t_min; if alpha is 0 at t_start,
            their first interval ends at sigma / alpha = 80, EDM's largest.
        sde: the process.
        intervals: how many.
        t_start: the first time.
        t_end: the last time.
        rho: the exponent of "karras", by default 7.

    Raises:
        ValueError: for an unknown spacing, a rho without "karras", or more intervals than discrete steps.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if rho is not None and spacing != "karras":
        raise ValueError(f"rho is an option of spacing='karras', got rho={rho} with spacing={spacing!r}")
    if t_start < t_end:
        return spaced(spacing, sde, intervals, t_end, t_start, rho).flip(0)
    if spacing in ("trailing", "leading"):
        if spacing == "leading" and t_start != sde.t_max:
            raise ValueError(f"spacing='leading' needs the process's t_max as t_start, got t_start={t_start:g}")
        return _integers(spacing, intervals, t_start / sde.t_max, t_end / sde.t_max) * sde.t_max
    if spacing == "uniform":
        return torch.linspace(t_start, t_end, intervals + 1, dtype=torch.float64, device="cpu")
    if spacing == "quadratic":
        return _between(t_start, t_end, intervals, lambda t: t.sqrt(), lambda root: root**2)
    if spacing == "karras":
        power = 7.0 if rho is None else check_number("rho", rho, "positive and finite", lambda rho: 0 < rho < math.inf)
        return _in_noise(sde, t_start, t_end, intervals, lambda s: s ** (1 / power), lambda root: root**power)
    return _in_noise(sde, t_start, t_end, intervals, torch.log, torch.exp)


def _between(
    first: float, last: float, intervals: int, map: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns points that are equidistant under ``map``, with both ends exactly as given."""
    ends = torch.tensor([first, last], dtype=torch.float64, device="cpu")
    low, high = map(ends).tolist()
    points = inverse(torch.linspace(low, high, intervals + 1, dtype=torch.float64, device="cpu"))
    if not torch.isfinite(points).all():
        raise ValueError(f"rho is too small: levels of noise between {last:g} and {first:g} are not finite")
    points[0], points[-1] = first, last
    return points


def _in_noise(
    sde: Process,
    t_start: float,
    t_end: float,
    intervals: int,
    map: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns times whose sigma / alpha are equidistant under ``map``, except at an end where it is 0 or infinite."""
    ends = torch.tensor([t_start, t_end], dtype=torch.float64, device="cpu")
    first, last = (sde.sigma(ends) / sde.alpha(ends)).tolist()
    from_noise, to_data = math.isinf(first), last == 0
    inner = intervals - from_noise - to_data
    if inner < 1:
        return spaced("uniform", sde, intervals, t_start, t_end)
    high = max(_MAX, 2 * last) if from_noise else first
    low = min(float(sde.sigma(sde.t_min) / sde.alpha(sde.t_min)), high / 2) if to_data else last
    times = time_of(sde, _between(high, low, inner, map, inverse))
    if not from_noise:
        times[0] = t_start
    if not to_data:
        times[-1] = t_end
    return torch.cat((ends[:from_noise], times, ends[2 - to_data :]))


def _integers(spacing: str, intervals: int, start: float, end: float) -> Tensor:
    """Returns the integers of "trailing" or "leading" in (end, start], divided by 1000, followed by the end."""
    high, low = round(start * _DISCRETE), int(end * _DISCRETE)
    if not math.isclose(start * _DISCRETE, high):
        raise ValueError(
            f"t_start must be one of the {_DISCRETE} discrete times with spacing={spacing!r}, got {start:g}"
        )
    if intervals > high - low:
        raise ValueError(f"spacing={spacing!r} has {high - low} discrete steps to take, got {intervals} intervals")
    index = torch.arange(intervals, dtype=torch.float64, device="cpu")
    if spacing == "trailing":
        steps = (high - (high - low) / intervals * index).round()
    else:
        steps = low + 1 + (high - low) // intervals * (intervals - 1 - index)
    return torch.cat((steps / _DISCRETE, torch.tensor([end], dtype=torch.float64, device="cpu")))


def time_of(sde: Process, levels: Tensor) -> Tensor:
    """Returns the times at which sigma / alpha, which grows with t, equals ``levels``, by bisection in float64.

    Raises:
        ValueError: for a level that the process does not reach by twice its last time.
    """
    levels = float64("levels", levels)
    low, high = torch.zeros_like(levels), torch.full_like(levels, sde.t_max)
    beyond = sde.sigma(high) < levels * sde.alpha(high)
    high[beyond] *= 2  # beyond the times that the network was trained at, which churn may need
    if not (sde.sigma(high) >= levels * sde.alpha(high)).all():
        raise ValueError(f"{sde} does not reach sigma / alpha = {levels.max().item():g}")
    for _ in range(100):
        middle = (low + high) / 2
        below = sde.sigma(middle) < levels * sde.alpha(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
