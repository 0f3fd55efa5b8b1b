"""DPM-Solver++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .forms import data_form, schedule, table
from .table import StepTable

__all__ = ["dpm_solver_pp_2m"]


def dpm_solver_pp_2m(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    stochastic: bool = False,
    lower_order_final: bool = True,
    clip: float | None = None,
) -> StepTable:
    """DPM-Solver++ 2M, midpoint form, of the ODE or of the SDE (Lu et al. 2022, "DPM-Solver++", eq. 4.2 and app. B).

    Arguments as for `ddpm`, and:
        stochastic: SDE-DPM-Solver++ 2M, with noise.
        lower_order_final: whether the last row is of first order. It always is where the last sigma is 0, since the
            second-order row does not exist there.
    """
    alpha, sigma, time = schedule(alpha, sigma, time, prediction)
    half_log_snr = torch.log(alpha / sigma)  # -inf at zero terminal SNR, where h is infinite, and a row from pure noise
    h = half_log_snr.diff()
    decay = torch.exp(-h)
    gain = -torch.expm1(-2 * h if stochastic else -h) * alpha[1:]
    previous = torch.zeros_like(h)  # the weight of (D - H), 1 / (2 r) with r = h_prev / h
    previous[1:] = h[1:] / (2 * h[:-1])
    if lower_order_final or sigma[-1] == 0:
        previous[-1] = 0
    return table(
        time,
        a=sigma[1:] / sigma[:-1] * (decay if stochastic else 1),
        c=-gain * previous,
        d=sigma[1:] * torch.sqrt(-torch.expm1(-2 * h)) if stochastic else None,
        e=gain * (1 + previous),
        data=data_form(alpha[:-1], sigma[:-1], prediction),
        clip=clip,
    )
