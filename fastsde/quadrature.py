"""Gauss-Legendre quadrature, for integrals over a step that have no closed form."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["gauss_legendre"]


@functools.cache
def gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Returns the nodes in [-1, 1] and their weights, float64 ``[points]``."""
    from numpy.polynomial import legendre  # takes as long to import as this whole package

    rule: Any = legendre.leggauss  # untyped before NumPy 2
    nodes, weights = rule(points)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
