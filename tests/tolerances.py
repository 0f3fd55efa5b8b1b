"""How far apart the samples of two backends may be that are both right."""

from __future__ import annotations

import torch

from fastsde import StepTable

NORMAL_ERROR = 4e-6  # of the noise contract


def noise_error(table: StepTable) -> float:
    """Returns how far apart two runs of a table may end whose normals differ by `NORMAL_ERROR`, but for the network.

    The difference of two states obeys the table's own recurrence: a row multiplies it by A, and by A + e p where D is
    not clamped; it adds |d| times that of the row's own normals. So the error of each draw, the prior's among them,
    counts as often as the later rows multiply it: for Euler-Maruyama on the VP-SDE some 20 to 200 times, for DDIM from
    t = 1 up to 1 / alpha(1) = 152 times.

    What the network makes of a different state is left out, so it must hardly depend on the state, or contract.
    """
    factors = (table.A + table.e[:, :, None] * table.p[:, None, :]).abs()
    if table.clip is not None:
        factors = factors.maximum(table.A.abs())
    error = torch.zeros(table.slots, dtype=torch.float64)
    error[0] = NORMAL_ERROR
    for factor, drawn in zip(factors, table.d.abs() * NORMAL_ERROR, strict=True):
        error = factor @ error + drawn
    return float(error[0])
