"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sde import VPSDE
from .forms import continuous_times, score_form, table
from .registry import Variant, solver
from .table import StepTable

__all__ = ["heun"]


@solver(Variant(2), rows=2)
def heun(
    sde: VPSDE, times: Tensor | Sequence[float], prediction: str = "score", euler_final: bool | None = None
) -> StepTable:
    """Heun's method on the probability-flow ODE dx = -1/2 beta (x + score) dt (Song et al. 2021, eq. 13).

    Two rows an interval: an Euler step whose H is ``x + h/2 f``, then the correction from H with the slope at the new
    point.

    Args:
        times: ``[K + 1]``, decreasing in [0, 1].
        prediction: what the network predicts.
        euler_final: whether the last interval is a lone Euler row. By default only where the correction does not
            exist: at t = 0, for a network that predicts no score (as Karras et al. 2022 do).
    """
    times = continuous_times(sde, times, prediction)
    if euler_final is None:
        euler_final = bool(times[-1] == 0) and prediction != "score"
    rows: list[list[float]] = []
    intervals = len(times) - 1
    for k in range(intervals):
        here, there = times[k : k + 1], times[k + 1 : k + 2]
        half = (here - there) / 2
        # The slope in backward time is slope_x x + slope_f f.
        r, s = score_form(sde, here, prediction)
        slope_x, slope_f = sde.beta(here) / 2 * (1 + r), sde.beta(here) / 2 * s
        euler = (here, 1 + 2 * half * slope_x, 2 * half * slope_f, 0.0, 1 + half * slope_x, half * slope_f)
        rows.append([float(value) for value in euler])
        if euler_final and k == intervals - 1:
            break
        r, s = score_form(sde, there, prediction)
        slope_x, slope_f = sde.beta(there) / 2 * (1 + r), sde.beta(there) / 2 * s
        rows.append([float(value) for value in (there, half * slope_x, half * slope_f, 1.0, 0.0, 0.0)])
    time, a, b, c, p, q = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1)
    return table(time, a=a, b=b, c=c, data=(p, q))
