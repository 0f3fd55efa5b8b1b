"""Libraries that the tests of compat compare with, and what they share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# fp32: some 20 steps of 8 rounded operations on states of up to 4, half an ulp each (2^-22), if all go the same way.
TOLERANCE = 20 * 8 * 2**-22


def library(name: str) -> Any:
    """Imports a library, whose own warnings are none of ours, or skips the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


class Field(nn.Module):
    """A small network of x ``[B, *shape]`` and a time or sigma for each sample."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(dim + 1, 16), nn.Linear(16, dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        column = torch.log1p(t.to(x.dtype).abs()).reshape(-1, 1).expand(len(x), 1)
        hidden = self.first(torch.cat([x, column], 1))
        return self.last(torch.tanh(hidden if y is None else hidden + y[:, None]))


def seeded(loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    return loop(*args, **kwargs)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compares relative to the largest number."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.isfinite(theirs).all()
    assert float(theirs.std()) > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))
