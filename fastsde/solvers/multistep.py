"""Shared by linear multistep solvers: a history in slots, growing orders, and integrals of Lagrange polynomials."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..quadrature import gauss_legendre
from .forms import data_form, eps_form, table
from .table import StepTable

__all__ = ["by_order", "check_order", "eps_multistep", "lagrange_integrals", "multistep", "row_orders"]

Weight = Callable[[Tensor], Tensor]


def check_order(order: int, most: int) -> None:
    """Raises unless the order is an int from 1 to ``most``."""
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an int, got {type(order).__name__}")
    if not 1 <= order <= most:
        raise ValueError(f"order must be {', '.join(map(str, range(1, most)))} or {most}, got {order}")


def row_orders(rows: int, order: int, lower_order_final: bool = False, from_noise: bool = False) -> list[int]:
    """Returns the order of each row: it grows from 1 with the history and can decrease to 1 at the end.

    Args:
        from_noise: whether the first point is pure noise, infinitely far away, and so not part of the history.
    """
    orders = [1, *(min(order, k + 1 - from_noise) for k in range(1, rows))]
    return [min(each, rows - k) for k, each in enumerate(orders)] if lower_order_final else orders


def by_order(orders: list[int]) -> Iterator[tuple[Tensor, int]]:
    """Yields the rows of each order, with the order."""
    for order in sorted(set(orders)):
        yield torch.tensor([k for k, each in enumerate(orders) if each == order], device="cpu"), order


def multistep(
    time: Tensor,
    *,
    a: Tensor,
    e: Tensor,
    history: Tensor,
    data: tuple[Tensor, Tensor],
    b: Tensor | None = None,
    d: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    clip: float | None = None,
) -> StepTable:
    """Builds the table of x' = a x + b f + e D + d z + sum_j history[:, j] H_j, where H_j was kept j + 1 rows ago.

    Args:
        history: ``[K, h]``; trailing columns of zeros take no slot.
        data: (p, q) with D = p x + q f.
        kept: (r, s), to keep r x + s f; by default D is kept.
    """
    depth = max((j + 1 for j in range(history.shape[1]) if history[:, j].any()), default=0)
    if kept is None and depth <= 1:
        return table(time, a=a, b=b, c=history[:, 0], d=d, e=e, data=data, clip=clip)
    base = table(time, a=a, b=b, d=d, e=e, data=data, clip=clip)
    if depth == 0:
        return base
    wide = {name: _widened(getattr(base, name), depth) for name in ("p", "b", "e", "d")}
    A = torch.zeros(len(time), depth + 1, depth + 1, dtype=torch.float64, device="cpu")
    A[:, 0, 0], A[:, 0, 1:] = base.A[:, 0, 0], history[:, :depth]
    A[:, range(2, depth + 1), range(1, depth)] = 1  # the rest of the history moves on
    if kept is None:
        wide["e"][:, 1] = 1
    else:
        A[:, 1, 0], wide["b"][:, 1] = kept
    return StepTable(time, q=base.q, A=A, clip=clip, **wide)


def _widened(column: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(column, (0, more))


def lagrange_integrals(nodes: Tensor, start: Tensor, end: Tensor, weight: Weight = torch.ones_like) -> Tensor:
    """Integrates ``weight`` times each Lagrange polynomial of R sets of p nodes, by Gauss's rule: ``[R, p]``.

    Args:
        nodes: ``[R, p]``.
        start, end: ``[R]``.
    """
    places, weights = gauss_legendre(64)
    half = ((end - start) / 2)[:, None]
    points = (start + end)[:, None] / 2 + half * places  # [R, 64]
    measure = half * weights * weight(points)
    integrals = []
    for j in range(nodes.shape[1]):
        product = measure
        for i in set(range(nodes.shape[1])) - {j}:
            product = product * ((points - nodes[:, i, None]) / (nodes[:, j] - nodes[:, i])[:, None])
        integrals.append(product.sum(dim=1))
    return torch.stack(integrals, dim=1)


def eps_multistep(
    alpha: Tensor,
    sigma: Tensor,
    time: Tensor,
    prediction: str,
    orders: list[int],
    integrals: Callable[[Tensor, Tensor, Tensor], Tensor],
    clip: float | None,
) -> StepTable:
    """Builds a multistep solver of d(x / alpha) = eps d(rho), rho = sigma / alpha, the probability-flow ODE.

    Each row is DDIM's, corrected by differences of eps: x' = alpha' D + sigma' eps + sum_j c_j (eps_j - eps).

    Args:
        orders: the order of each row, from `row_orders`.
        integrals: maps (rho of the nodes, newest first, rho, rho') to the integrals of their polynomials over rho, like
            `lagrange_integrals`.
    """
    rho = sigma / alpha
    history = torch.zeros(len(time), max(1, max(orders) - 1), dtype=torch.float64, device="cpu")
    for rows, order in by_order(orders):
        if order > 1:
            found = integrals(rho[rows[:, None] - torch.arange(order, device="cpu")], rho[rows], rho[rows + 1])
            history[rows, : order - 1] = alpha[rows + 1, None] * found[:, 1:]
    r, s = eps_form(alpha[:-1], sigma[:-1], prediction)
    direction = sigma[1:] - history.sum(dim=1)
    data = data_form(alpha[:-1], sigma[:-1], prediction)
    return multistep(
        time, a=direction * r, b=direction * s, e=alpha[1:], history=history, data=data, kept=(r, s), clip=clip
    )
