"""DEIS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import check_bool
from .forms import schedule
from .multistep import check_order, eps_multistep, lagrange_integrals, row_orders
from .registry import Variant, solver
from .table import StepTable

__all__ = ["deis"]


@solver(Variant(2), Variant(3, options={"order": 3}), Variant(1, options={"order": 1}))
def deis(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    order: int = 2,
    lower_order_final: bool = True,
    clip: float | None = None,
) -> StepTable:
    """DEIS, Adams-Bashforth form (Zhang & Chen 2023, arXiv:2204.13902), with polynomials in log(rho).

    With rho = sigma / alpha, eps is interpolated in log(rho) through the last ``order`` points and integrated over rho,
    as in diffusers. The state has ``order`` slots.

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last, as for `ddpm`.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        order: 1 (the same as `ddim`), 2 or 3.
        lower_order_final: whether the order decreases to 1 in the last rows. A last row down to sigma = 0, where
            log(rho) is infinite, always has first order.
        clip: bound of the predicted x_0, or None; the direction uses the unclipped eps.
    """
    alpha, sigma, time = schedule(alpha, sigma, time, prediction, upwards=True)
    check_order(order, 3)
    check_bool("lower_order_final", lower_order_final)
    orders = row_orders(len(time), order, lower_order_final, from_noise=bool(alpha[0] == 0))
    if sigma[-1] == 0:
        orders[-1] = 1
    return eps_multistep(alpha, sigma, time, prediction, orders, _integrals, clip)


def _integrals(rho: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return lagrange_integrals(rho.log(), start.log(), end.log(), torch.exp)
