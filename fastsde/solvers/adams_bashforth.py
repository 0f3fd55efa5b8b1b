"""Adams-Bashforth: linear multistep on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .forms import schedule
from .multistep import check_order, eps_multistep, lagrange_integrals, row_orders
from .registry import Variant, solver
from .table import StepTable

__all__ = ["adams_bashforth"]


@solver(
    Variant(4), Variant(3, options={"order": 3}), Variant(2, options={"order": 2}), Variant(1, options={"order": 1})
)
def adams_bashforth(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    order: int = 4,
    clip: float | None = None,
) -> StepTable:
    """Adams-Bashforth of variable steps on d(x / alpha) = eps d(sigma / alpha) (Karras et al. 2022, arXiv:2206.00364).

    This is k-diffusion's LMS: eps is interpolated by a Lagrange polynomial in sigma / alpha through the last ``order``
    points and integrated exactly. (PNDM, arXiv:2202.09778, uses the coefficients for equal steps instead.) The first
    rows have lower order. The state has ``order`` slots.

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last, as for `ddpm`.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        order: 1 (the same as `ddim`) to 4.
        clip: bound of the predicted x_0, or None; the direction uses the unclipped eps.
    """
    alpha, sigma, time = schedule(alpha, sigma, time, prediction, upwards=True)
    check_order(order, 4)
    orders = row_orders(len(time), order, from_noise=bool(alpha[0] == 0))
    return eps_multistep(alpha, sigma, time, prediction, orders, lagrange_integrals, clip)
