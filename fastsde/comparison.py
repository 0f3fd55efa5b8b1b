"""Whether another way to compute a network gives its output: the check of programs and exports before their use."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_near", "largest"]

_TOLERANCE = 1e-3  # of the largest output; another function differs by its size, roundings by a thousandth of this


def largest(x: Tensor) -> float:
    """Returns the largest finite magnitude of a tensor, or 0 if it has none."""
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def is_near(found: Tensor, expected: Tensor) -> bool:
    """Returns whether an output is the expected one up to rounding, with NaN and infinity at the same places."""
    return torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * largest(expected), equal_nan=True)
