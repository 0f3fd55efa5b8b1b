"""Tables of arbitrary coefficients, which no objective has, to test the part of each column."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PATTERNS", "table_of"]

# The columns that are zero: u_x, u_z, w_f, w_x, w_z are 1 to 5.
PATTERNS = {
    "all": (),
    "score": (4,),
    "data alone": (2, 5),
    "noise alone": (1, 4),
    "network alone": (4, 5),
    "zeros by sample": None,
}


def table_of(pattern: str, batch: int) -> Tensor:
    """Returns coefficients fp32 ``[batch, 6]``, each of order 1 or zero."""
    table = torch.randn(batch, 6)
    columns = PATTERNS[pattern]
    if columns is None:
        return table * (torch.rand(batch, 6) < 0.6)
    table[:, list(columns)] = 0
    return table
