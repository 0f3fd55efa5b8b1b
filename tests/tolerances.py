"""How much the samples of two correct backends may differ."""

from __future__ import annotations

import torch

from fastsde import StepTable

NORMAL_ERROR = 4e-6  # of the noise contract


def noise_error(table: StepTable) -> float:
    """Returns how much two runs of a table may differ at the end if their normals differ by `NORMAL_ERROR`.

    The difference of two states follows the table's own recurrence: s' = (A + e p) s + d z, or A s where D is clamped.
    So the error of each draw, including the prior's, is multiplied by the later rows: for Euler-Maruyama on the VP-SDE
    some 20 to 200 times, for DDIM from t = 1 up to 1 / alpha(1) = 152 times.

    The network's response to a different state is left out, so it must hardly depend on the state, or be a contraction.
    """
    error = torch.zeros(table.slots, dtype=torch.float64, device="cpu")
    error[0] = NORMAL_ERROR
    for A, e, p, d in zip(table.A, table.e, table.p, table.d, strict=True):
        factors = (A + torch.outer(e, p)).abs()
        if table.clip is not None:
            factors = torch.maximum(factors, A.abs())
        error = factors @ error + d.abs() * NORMAL_ERROR
    return float(error[0])
