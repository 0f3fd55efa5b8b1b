"""The classical Runge-Kutta method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..sde import Process
from ..validation import check_int
from .forms import continuous_times, finite_velocity_form, has_velocity
from .registry import Variant, solver
from .table import StepTable

__all__ = ["rk4"]

Matrix = list[list[float]]

# By the number of rows of an interval: c, the places of the rows in it, from 0 to 1, which are also the shares of the
# interval by which the point of each next row lies ahead; and the weights of the velocities. In each method, a row's
# point depends on the velocity of the row before it only. Those of less than four rows have none at the end.
NODES = {1: (0.0,), 2: (0.0, 0.5), 3: (0.0, 1 / 3, 2 / 3), 4: (0.0, 0.5, 0.5, 1.0)}
WEIGHTS = {1: (1.0,), 2: (0.0, 1.0), 3: (1 / 4, 0.0, 3 / 4), 4: (1 / 6, 1 / 3, 1 / 3, 1 / 6)}


@solver(Variant(4), corrects_at=has_velocity, rows_per_interval=4, weights=WEIGHTS)
def rk4(
    sde: Process, times: Tensor | Sequence[float], prediction: str = "score", final_rows: int | None = None
) -> StepTable:
    """The classical Runge-Kutta method of order 4 on the probability-flow ODE dx/dt = v(x, t).

    (Kutta 1901; the ODE: Song et al. 2021, arXiv:2011.13456, eq. 13.) Four rows per interval h, each one network call:

        v_1 = v(x, t),  v_2 = v(x + h/2 v_1, t + h/2),  v_3 = v(x + h/2 v_2, t + h/2),  v_4 = v(x + h v_3, t + h)
        x'  = x + h/6 (v_1 + 2 v_2 + 2 v_3 + v_4)

    The slots are the point of the row's call, x, and the sum of x and of the weighted velocities so far.

    Args:
        sde: the process.
        times: ``[K + 1]``, decreasing or increasing in [0, t_max].
        prediction: what the network predicts, one of `PREDICTIONS`.
        final_rows: how many rows the last interval takes: 4, or the method of as many stages that has no row at the
            end: 3 (Heun's of order 3, after which the order over all is still 4), 2 (midpoint) or 1 (Euler). By
            default 4, or 3 if the network's velocity is not finite at the last time: mostly at t = 0, where sigma is 0.

    Raises:
        TypeError, ValueError: for an invalid argument, or if the velocity is needed where it is not finite.
    """
    times = continuous_times(sde, times, prediction, upwards=True)
    if final_rows is None:
        final_rows = 4 if has_velocity(sde, float(times[-1]), prediction) else 3
    check_int("final_rows", final_rows, 1, 5)
    stages = [4] * (len(times) - 2) + [final_rows]
    intervals = list(zip(pairwise(times.tolist()), stages, strict=True))
    time = [end if node == 1 else start + node * (end - start) for (start, end), n in intervals for node in NODES[n]]
    on_time = torch.tensor(time, dtype=torch.float64, device="cpu")
    velocity = zip(*(each.tolist() for each in finite_velocity_form(sde, on_time, prediction)), strict=True)
    rows = [row for (start, end), n in intervals for row in _rows(end - start, n, velocity)]
    A, b = (torch.tensor(column, dtype=torch.float64, device="cpu") for column in zip(*rows, strict=True))
    return StepTable(on_time, A=A, b=b)


def _rows(h: float, stages: int, velocity: Iterator[tuple[float, float]]) -> Iterator[tuple[Matrix, list[float]]]:
    """Yields A and b of the rows of an interval.

    Args:
        velocity: yields (r, s) of each row, where the velocity is r x + s f.
    """
    ahead, weights = NODES[stages][1:], WEIGHTS[stages]
    for stage, weight in enumerate(weights):
        x, total = (1, 2) if stage else (0, 0)  # the slots of x and of the sum
        r, s = next(velocity)
        A, b = [[0.0] * 3 for _ in range(3)], [0.0] * 3
        if stage + 1 < stages:
            A[0][x] = A[1][x] = A[2][total] = 1.0
            parts = {0: ahead[stage] * h, 2: weight * h}
        else:
            A[0][total] = 1.0
            parts = {0: weight * h}
        for slot, share in parts.items():
            A[slot][0] += share * r
            b[slot] = share * s
        yield A, b
