"""UniPC, a predictor and corrector of one network call a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..validation import check_bool, check_int
from .forms import data_form, schedule
from .multistep import lagrange_integrals, row_orders
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
    """UniPC (Zhao et al. 2023, arXiv:2302.04867) of the predicted x_0, whose corrector UniC costs no network call.

    Row k evaluates the network at the predicted point x_k, uses this D_k to correct that point, and predicts x_(k+1)
    from the corrected one. Since the corrected point is y_k + rho_k D_k, where y_k is known a row earlier, the slots are
    x_k, y_k and the last order - 1 values of D: order + 1 in all.

    Args:
        alpha, sigma, time, prediction, clip: as for `ddpm`.
        order: p of UniPC-p, 1, 2 or 3; with its corrector the order of accuracy is p + 1.
        variant: B(h), "bh1" (h) or "bh2" (e^h - 1).
        lower_order_final: whether the order comes down to 1 in the last rows. A last row down to sigma = 0 is of first
            order in any case.
    """
    alpha, sigma, time = schedule(alpha, sigma, time, prediction)
    check_int("order", order, 1, 4), check_bool("lower_order_final", lower_order_final)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    orders = row_orders(alpha, order, lower_order_final)
    if sigma[-1] == 0:
        orders[-1] = 1
    rows, slots = len(time), order + 1
    A, e = (torch.zeros(rows, slots, *more, dtype=torch.float64, device="cpu") for more in ((slots,), ()))
    A[:, range(3, slots), range(2, slots - 1)] = 1  # the history of D moves on
    e[:, 2:3] = 1
    levels, rho = torch.log(alpha / sigma).tolist(), 0.0
    for k, each in enumerate(orders):
        h = levels[k + 1] - levels[k]
        ratios = [(levels[k - j] - levels[k]) / h for j in range(1, each)]
        first, scale = -float(alpha[k + 1]) * math.expm1(-h), float(sigma[k + 1] / sigma[k])
        predictor = _predictor(h, ratios, variant) * float(alpha[k + 1])
        _fill(A, e, k, 0, scale, rho, first - predictor.sum(), predictor)
        if math.isinf(h):  # from pure noise, which tells the corrector nothing, or to clean data, where all is done
            _fill(A, e, k, 1, scale, rho, first, predictor)
            rho = 0.0
            continue
        *corrector, after = _corrector(h, ratios, variant) * float(alpha[k + 1])
        _fill(A, e, k, 1, scale, rho, first - sum(corrector) - after, corrector)
        rho = after
    p, q = data_form(alpha[:-1], sigma[:-1], prediction)
    return StepTable(time, A=A, p=torch.nn.functional.pad(p[:, None], (0, order)), q=q, e=e, clip=clip)


def _fill(A: Tensor, e: Tensor, k: int, slot: int, scale: float, rho: float, now: float, before: Sequence[float]) -> None:
    """slot' = scale (corrected x_k) + now D_k + sum of before D_(k-1), ...; the corrected x_k is y_k + rho D_k."""
    A[k, slot, 1 if k else 0] = scale  # x_0 has no corrector
    A[k, slot, 2 : 2 + len(before)] = torch.tensor([float(each) for each in before], dtype=torch.float64, device="cpu")
    e[k, slot] = scale * rho + now


def _predictor(h: float, ratios: list[float], variant: str) -> np.ndarray:
    """The weights of D_(k-1), ... in the prediction, each as a difference from D_k, over alpha."""
    if not ratios:
        return np.zeros(0)
    if len(ratios) == 1:  # the paper's choice for order 2
        return _scale(h, variant) * 0.5 / np.array(ratios)
    return _moments(h, ratios) / np.array(ratios)


def _corrector(h: float, ratios: list[float], variant: str) -> np.ndarray:
    """The same of the correction, with D_(k+1) as the last."""
    if not ratios:  # the paper's choice for order 1
        return np.array([_scale(h, variant) * 0.5])
    return _moments(h, [*ratios, 1.0]) / np.array([*ratios, 1.0])


def _scale(h: float, variant: str) -> float:
    """-B(-h)."""
    return h if variant == "bh1" else -math.expm1(-h)


def _moments(h: float, ratios: list[float]) -> np.ndarray:
    """The weights rho with sum_j rho_j r_j^(i-1) = i-th moment of the exponential integrator; B(h) cancels out of them."""
    moments = [_moment(h, i) for i in range(1, len(ratios) + 1)]
    return np.linalg.solve(np.vander(np.array(ratios), increasing=True).T, np.array(moments))


def _moment(h: float, power: int) -> float:
    """The integral of h e^(-h (1 - u)) u^power over [0, 1]."""
    return lagrange_integrals([0.0], 0.0, 1.0, lambda u: h * np.exp(-h * (1 - u)) * u**power)[0]
