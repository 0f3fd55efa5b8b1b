"""Euler-Maruyama on the reverse SDE, and its exponential form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sde import VPSDE
from .forms import continuous_times, data_form, score_form, table
from .registry import Variant, solver
from .table import StepTable

__all__ = ["euler_maruyama", "exponential_euler_maruyama"]


@solver(Variant(1, noise=True))
def euler_maruyama(sde: VPSDE, times: Tensor | Sequence[float], prediction: str = "score") -> StepTable:
    """Euler-Maruyama on the reverse SDE (Song et al. 2021, eq. 6), noise on every row.

    Args:
        times: ``[K + 1]``, decreasing in [0, 1].
        prediction: what the network predicts: "score", "eps", "x0" or "v".
    """
    times = continuous_times(sde, times, prediction)
    time, step = times[:-1], -times.diff()
    rate = sde.beta(time) * step
    r, s = score_form(sde, time, prediction)
    data = data_form(sde.alpha(time), sde.sigma(time), prediction)
    return table(time, a=1 + rate / 2 + rate * r, b=rate * s, d=rate.sqrt(), data=data)


@solver(Variant(1, noise=True))
def exponential_euler_maruyama(sde: VPSDE, times: Tensor | Sequence[float], prediction: str = "score") -> StepTable:
    """Exponential Euler-Maruyama: the linear part and the noise of the reverse SDE exact, the score held over a step.

    With I the integral of beta over the step: x' = e^(I/2) x + 2 (e^(I/2) - 1) score + sqrt(e^I - 1) z.
    """
    times = continuous_times(sde, times, prediction)
    time, integral = times[:-1], -sde.integral_beta(times).diff()
    growth = torch.expm1(integral / 2)
    r, s = score_form(sde, time, prediction)
    data = data_form(sde.alpha(time), sde.sigma(time), prediction)
    noise = torch.expm1(integral).sqrt()
    return table(time, a=1 + growth + 2 * growth * r, b=2 * growth * s, d=noise, data=data)
