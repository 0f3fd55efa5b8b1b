"""Euler-Maruyama on the reverse SDE, and its exponential form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sde import Process
from .forms import continuous_times, data_form, score_form, table
from .registry import Variant, solver
from .table import StepTable

__all__ = ["euler_maruyama", "exponential_euler_maruyama"]


@solver(Variant(1, noise=True), needs_alpha=True)
def euler_maruyama(sde: Process, times: Tensor | Sequence[float], prediction: str = "score") -> StepTable:
    """Euler-Maruyama on the reverse SDE (Song et al. 2021, arXiv:2011.13456, eq. 6), noise on every row.

    With f and g^2 of the process at the row's time and its step h:

        x' = (1 - f h) x + g^2 h score + sqrt(g^2 h) z

    Args:
        sde: the process.
        times: ``[K + 1]``, decreasing in [0, t_max].
        prediction: what the network predicts, one of `PREDICTIONS`.

    Raises:
        TypeError, ValueError: for an invalid argument; also for a time at which the process has no reverse SDE, since
            alpha is 0 and the drift infinite.
    """
    time, after = _steps(sde, times, prediction)
    step, rate = time - after, sde.squared_diffusion(time)
    return _held_score(sde, time, prediction, 1 - sde.drift_coefficient(time) * step, rate * step, (rate * step).sqrt())


@solver(Variant(1, noise=True), needs_alpha=True)
def exponential_euler_maruyama(sde: Process, times: Tensor | Sequence[float], prediction: str = "score") -> StepTable:
    """Exponential Euler-Maruyama: exact in the linear part and the noise, with the score constant over a step.

    With primes for the values after a step, and lambda = sigma / alpha:

        x' = alpha'/alpha x + (alpha' integral of alpha d(lambda^2)) score + alpha' sqrt(lambda^2 - lambda'^2) z

    On the VP-SDE, with I the integral of beta over the step: x' = e^(I/2) x + 2 (e^(I/2) - 1) score + sqrt(e^I - 1) z.

    Args:
        sde: the process.
        times: ``[K + 1]``, decreasing in [0, t_max].
        prediction: what the network predicts, one of `PREDICTIONS`.

    Raises:
        TypeError, ValueError: as for `euler_maruyama`.
    """
    time, after = _steps(sde, times, prediction)
    scale, weight, variance = sde.exact_step(time, after)
    return _held_score(sde, time, prediction, scale, weight, variance.sqrt())


def _steps(sde: Process, times: Tensor | Sequence[float], prediction: str) -> tuple[Tensor, Tensor]:
    """Returns the times before and after each row; raises if the reverse SDE does not exist at one of them."""
    times = continuous_times(sde, times, prediction)
    time = times[:-1]
    # A drift beyond the resolution of fp32 comes from an alpha that is 0 up to rounding.
    exists = (sde.drift_coefficient(time).abs() * time < 2.0**24) & torch.isfinite(sde.squared_diffusion(time))
    if not exists.all():
        raise ValueError(
            f"{sde!r} has no reverse SDE at t = {time[~exists][0].item():g}, where alpha is 0 and the drift infinite: "
            f"pick a solver of the probability flow such as heun, ddim or unipc, or ddpm; or start below, by t_start "
            f"with an x_init of that time"
        )
    return time, times[1:]


def _held_score(sde: Process, time: Tensor, prediction: str, scale: Tensor, weight: Tensor, noise: Tensor) -> StepTable:
    """Builds the table of x' = scale x + weight score + noise z."""
    r, s = score_form(sde, time, prediction)
    data = data_form(sde.alpha(time), sde.sigma(time), prediction)
    return table(time, a=scale + weight * r, b=weight * s, d=noise, data=data)
