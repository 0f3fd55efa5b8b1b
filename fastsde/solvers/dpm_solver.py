"""DPM-Solver++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import check_bool
from .forms import data_form, schedule, table
from .multistep import multistep, row_orders
from .registry import Variant, solver
from .table import StepTable

__all__ = ["dpm_solver_pp_2m", "dpm_solver_pp_3m"]


@solver(Variant(2), Variant(2, noise=True, options={"stochastic": True}))
def dpm_solver_pp_2m(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    stochastic: bool = False,
    lower_order_final: bool = True,
    clip: float | None = None,
) -> StepTable:
    """DPM-Solver++ 2M, midpoint form, of the ODE or of the SDE (Lu et al. 2022, arXiv:2211.01095, sec. 4.2, app. B).

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last, as for `ddpm`.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        stochastic: whether to use SDE-DPM-Solver++ 2M, with noise.
        lower_order_final: whether the last row has first order. It always does if the last sigma is 0, since the
            second-order row does not exist there.
        clip: bound of the predicted x_0, or None.
    """
    check_bool("stochastic", stochastic), check_bool("lower_order_final", lower_order_final)
    alpha, sigma, time = schedule(alpha, sigma, time, prediction, upwards=not stochastic)
    half_log_snr = torch.log(alpha / sigma)  # -inf at zero terminal SNR: the row from pure noise then has an infinite h
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


@solver(
    Variant(2),
    Variant(2, options={"variant": "heun"}),
    Variant(2, noise=True, options={"stochastic": True}),
)
def dpm_solver_pp_3m(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    stochastic: bool = False,
    lower_order_final: bool = True,
    variant: str = "midpoint",
    clip: float | None = None,
) -> StepTable:
    """DPM-Solver++ 3M of the ODE (Lu et al. 2022, arXiv:2211.01095, and its code) or of the SDE (k-diffusion's).

    The coefficients are those in common use, in which the term of the second derivative is half of Taylor's: the order
    of convergence is 2, with a smaller error than 2M's. (diffusers 0.42 has the opposite sign in that term for the SDE,
    which reduces it to order 1.) The state has three slots.

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last, as for `ddpm`.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        stochastic: whether to use SDE-DPM-Solver++ 3M, with noise.
        lower_order_final: whether the last two rows have order 2 and 1. If the last sigma is 0, the last row always
            has order 1.
        variant: form of the second-order rows, "midpoint" as in `dpm_solver_pp_2m`, or "heun".
        clip: bound of the predicted x_0, or None.
    """
    check_bool("stochastic", stochastic), check_bool("lower_order_final", lower_order_final)
    alpha, sigma, time = schedule(alpha, sigma, time, prediction, upwards=not stochastic)
    if variant not in ("midpoint", "heun"):
        raise ValueError(f"variant must be midpoint or heun, got {variant!r}")
    order = torch.tensor(row_orders(len(time), 3, lower_order_final), device="cpu")
    if sigma[-1] == 0:
        order[-1] = 1
    h = torch.log(alpha / sigma).diff()
    scaled = 2 * h if stochastic else h
    phi_1 = -torch.expm1(-scaled)
    phi_2 = 1 - phi_1 / scaled
    phi_3 = 0.5 - phi_2 / scaled
    zero = torch.zeros_like(h)
    newer, older = zero.clone(), zero.clone()  # 1 / r of the paper
    newer[1:], older[2:] = h[1:] / h[:-1], h[2:] / h[:-2]
    # First differences, 1 / r0 (D - H_1) and 1 / r1 (H_1 - H_2), and their weights.
    mixed = torch.where(older > 0, older / (newer + older), zero)  # r0 / (r0 + r1)
    second = torch.where(order == 3, phi_2 * mixed + phi_3 * mixed * newer, zero)
    slope = torch.where(order == 2, phi_1 / 2 if variant == "midpoint" else phi_2, torch.where(order == 3, phi_2, zero))
    first, other = alpha[1:] * newer * (slope + second), alpha[1:] * older * second
    first, other = torch.where(order > 1, first, zero), torch.where(order > 2, other, zero)
    return multistep(
        time,
        a=sigma[1:] / sigma[:-1] * (torch.exp(-h) if stochastic else 1),
        d=sigma[1:] * torch.sqrt(-torch.expm1(-2 * h)) if stochastic else None,
        e=alpha[1:] * phi_1 + first,
        history=torch.stack((-first - other, other), dim=1),
        data=data_form(alpha[:-1], sigma[:-1], prediction),
        clip=clip,
    )
