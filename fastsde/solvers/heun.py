"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sde import Process
from .forms import continuous_times, finite_velocity_form, has_velocity, table
from .registry import Variant, solver
from .table import StepTable

__all__ = ["heun"]


@solver(Variant(2), corrects_at=has_velocity, rows_per_interval=2, weights={1: (1.0,), 2: (0.5, 0.5)})
def heun(
    sde: Process, times: Tensor | Sequence[float], prediction: str = "score", euler_final: bool | None = None
) -> StepTable:
    """Heun's method on the probability-flow ODE dx/dt = alpha' x_0 + sigma' eps = f x - 1/2 g^2 score.

    (Song et al. 2021, arXiv:2011.13456, eq. 13; Karras et al. 2022, arXiv:2206.00364, algorithm 1.) Two rows per
    interval: an Euler step whose H is ``x + h/2 x'``, then the correction from H with the slope at the new point.

    Args:
        sde: the process.
        times: ``[K + 1]``, decreasing or increasing in [0, t_max].
        prediction: what the network predicts, one of `PREDICTIONS`.
        euler_final: whether the last interval is a single Euler row. By default only if the network's velocity is not
            finite at the last time: mostly at t = 0, where sigma is 0 (as in Karras et al.). A network that takes
            log(sigma), such as theirs, needs it there whatever it predicts.

    Raises:
        TypeError, ValueError: for an invalid argument, or if the velocity is needed where it is not finite.
    """
    times = continuous_times(sde, times, prediction, upwards=True)
    if euler_final is None:
        euler_final = not has_velocity(sde, float(times[-1]), prediction)
    r, s = finite_velocity_form(sde, times[: len(times) - euler_final], prediction)
    half = -times.diff() / 2
    correct = slice(len(half) - euler_final)
    one, zero = torch.ones_like(half), torch.zeros_like(half)

    def rows(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), dim=1).flatten()[: 2 * len(half) - euler_final]

    def after(slope: Tensor) -> Tensor:
        return torch.cat((-half[correct] * slope[1:], zero))[: len(half)]

    # The slope in backward time is -r x - s f.
    first_r, first_s = (-half * slope[: len(half)] for slope in (r, s))
    return table(
        rows(times[:-1], times[1:]),
        a=rows(1 + 2 * first_r, after(r)),
        b=rows(2 * first_s, after(s)),
        c=rows(zero, one),
        data=(rows(1 + first_r, zero), rows(first_s, zero)),
    )
