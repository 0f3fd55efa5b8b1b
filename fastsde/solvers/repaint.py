"""RePaint's resampling: the rows of a table go down and up again, several times."""

from __future__ import annotations

import torch

from ..sde import Process
from ..validation import check_int
from .table import StepTable

__all__ = ["repaint"]


def repaint(table: StepTable, sde: Process, resamples: int, jump: int = 10) -> StepTable:
    """Returns the table with resampling (RePaint; Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1 and section 4.2).

    At every ``jump``-th time, counted from the last row's, the trajectory goes back up by ``jump`` rows, if there are
    so many, and comes down again, until it has gone down ``resamples`` times. Of K rows this makes
    K + (resamples - 1) jump (ceil(K / jump) - 1).

    The way up from t_i to t_j is a draw of the forward process, x_j = a x_i + sqrt(sigma_j^2 - a^2 sigma_i^2) z with
    a = alpha_j / alpha_i. It calls no network, so it is part of the row that comes down to t_i, and its noise and that
    of the row are one normal. Known values that are put in after such a row are those of t_j: the forward process takes
    those of t_i to the same distribution.

    Args:
        table: one slot, with rows that each end at the time of the next one, decreasing times of the process.
        sde: the process.
        resamples: how often each part of the way is gone down; 1 leaves the table as it is.
        jump: the rows that each way up undoes.

    Raises:
        ValueError: for a table of several slots, whose history does not fit the state after a way up; for Langevin
            rows, whose noise is sized by norms; or for a jump as long as the table.
    """
    check_int("resamples", resamples, 1), check_int("jump", jump, 1)
    if resamples == 1:
        return table
    if table.slots > 1:
        raise ValueError(f"resamples needs a solver whose rows have no history, got a table of {table.slots} slots")
    if table.has_langevin:
        raise ValueError("resamples needs rows with noise of a fixed size, got a table with Langevin rows")
    if jump >= len(table):
        raise ValueError(f"jump must be less than the number of rows, {len(table)}, got {jump}")
    row = torch.tensor(_order(len(table), resamples, jump), device="cpu")
    after = torch.cat((row[1:], row[-1:] + 1))  # the row whose time the state then has
    goes_up = after <= row
    alpha, sigma = sde.alpha(table.time), sde.sigma(table.time)
    scale, variance = torch.ones_like(table.time[row]), torch.zeros_like(table.time[row])
    low, high = row[goes_up] + 1, after[goes_up]
    scale[goes_up] = alpha[high] / alpha[low]
    variance[goes_up] = (sigma[high] ** 2 - (scale[goes_up] * sigma[low]) ** 2).clamp(min=0)
    columns = {name: getattr(table, name)[row] for name in ("time", "n", "p", "q", "A", "b", "e", "d")}
    columns.update({name: columns[name] * scale[:, None] for name in ("b", "e")}, A=columns["A"] * scale[:, None, None])
    columns["d"] = torch.hypot(columns["d"] * scale[:, None], variance.sqrt()[:, None])
    return StepTable(**columns, clip=table.clip)


def _order(rows: int, resamples: int, jump: int) -> list[int]:
    """Returns the rows in the order in which they run."""
    ways_up = dict.fromkeys(range(rows - 1, jump - 1, -jump), resamples - 1)  # left, by the row that they start before
    order, row = [], 0
    while row < rows:
        order.append(row)
        row += 1
        if ways_up.get(row, 0) > 0:
            ways_up[row] -= 1
            row -= jump
    return order
