"""UniPC, a predictor-corrector with one network call per step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import check_bool
from .forms import data_form, schedule
from .multistep import by_order, check_order, lagrange_integrals, row_orders
from .registry import Variant, solver
from .table import StepTable

__all__ = ["unipc"]

VARIANTS = ("bh1", "bh2")


@solver(Variant(3), *(Variant(p + 1, options={"order": p, "variant": v}) for p in (1, 2, 3) for v in VARIANTS))
def unipc(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
    clip: float | None = None,
) -> StepTable:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867) for the predicted x_0. Its corrector, UniC, costs no network call.

    Row k evaluates the network at the predicted point x_k, uses this D_k to correct that point, and predicts x_(k+1)
    from the corrected point. The corrected point is y_k + rho_k D_k, where y_k is known a row earlier, so that the
    slots are x_k, y_k and the last order - 1 values of D: order + 1 in all.

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last, as for `ddpm`.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        order: p of UniPC-p, 1, 2 or 3; with the corrector the order of accuracy is p + 1.
        variant: B(h), "bh1" (h) or "bh2" (e^h - 1).
        lower_order_final: whether the order decreases to 1 in the last rows. A last row down to sigma = 0 always has
            first order.
        clip: bound of the predicted x_0, or None.
    """
    alpha, sigma, time = schedule(alpha, sigma, time, prediction, upwards=True)
    check_order(order, 3)
    check_bool("lower_order_final", lower_order_final)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    orders = row_orders(len(time), order, lower_order_final, from_noise=bool(alpha[0] == 0))
    if sigma[-1] == 0:
        orders[-1] = 1
    predictor, corrector, last = _weights(torch.log(alpha / sigma), orders, order, variant)
    after, scale = alpha[1:], sigma[1:] / sigma[:-1]
    whole = -torch.expm1(-torch.log(alpha / sigma).diff()) * after
    rho = torch.nn.functional.pad((after * last)[:-1], (1, 0))  # rho_k of the corrector that follows each prediction

    slots = order + 1
    A, e = (torch.zeros(len(time), slots, *more, dtype=torch.float64, device="cpu") for more in ((slots,), ()))
    A[:, :2, 1] = scale[:, None]  # times the corrected x_k = y_k + rho_k D_k
    A[0, :2, :2] = A[0, :2, :2].flip(-1)  # x_0 has no corrector
    A[:, 0, 2:], A[:, 1, 2:] = after[:, None] * predictor, after[:, None] * corrector
    A[:, range(3, slots), range(2, slots - 1)] = 1  # the history of D moves on
    e[:, 0] = scale * rho + whole - after * predictor.sum(dim=1)
    e[:, 1] = scale * rho + whole - after * (corrector.sum(dim=1) + last)
    e[:, 2:3] = 1
    p, q = data_form(alpha[:-1], sigma[:-1], prediction)
    return StepTable(time, A=A, p=torch.nn.functional.pad(p[:, None], (0, order)), q=q, e=e, clip=clip)


def _weights(level: Tensor, orders: list[int], order: int, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weights of D_(k-1), ... as differences from D_k, over alpha.

    Returns:
        The weights in the predictor and in the corrector ``[K, order - 1]``, and of D_(k+1) in the corrector ``[K]``.
    """
    h = level.diff()
    predictor, corrector = (torch.zeros(len(h), order - 1, dtype=torch.float64, device="cpu") for _ in range(2))
    last = torch.zeros_like(h)
    for rows, each in by_order(orders):
        # h is infinite from pure noise, which gives the corrector no information, and to clean data, which is the end.
        rows = rows[torch.isfinite(h[rows])]
        step = h[rows, None]
        ratios = (level[rows[:, None] - torch.arange(1, each, device="cpu")] - level[rows, None]) / step
        minus_b = step if variant == "bh1" else -torch.expm1(-step)
        # The paper's choices for a predictor of order 2 and a corrector of order 1 are the only ones that know B(h).
        predictor[rows, : each - 1] = minus_b / 2 / ratios if each == 2 else _solved(step, ratios)
        with_next = torch.nn.functional.pad(ratios, (0, 1), value=1.0)
        found = minus_b / 2 if each == 1 else _solved(step, with_next)
        corrector[rows, : each - 1], last[rows] = found[:, :-1], found[:, -1]
    return predictor, corrector, last


def _solved(h: Tensor, ratios: Tensor) -> Tensor:
    """Solves sum_j w_j r_j^i = the integral of h e^(-h (1 - u)) u^i over [0, 1], for i from 1 to p: w ``[R, p]``."""
    powers = range(1, ratios.shape[1] + 1)
    moments = [_moment(h, power) for power in powers]
    if not moments:
        return ratios
    matrix = torch.stack([ratios**power for power in powers], dim=1)
    weights: Tensor = torch.linalg.solve(matrix, torch.stack(moments, dim=1))
    return weights


def _moment(h: Tensor, power: int) -> Tensor:
    zero = torch.zeros_like(h[:, 0])
    weighted = lagrange_integrals(zero[:, None], zero, zero + 1, lambda u: h * torch.exp(-h * (1 - u)) * u**power)
    return weighted[:, 0]
