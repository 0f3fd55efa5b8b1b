"""Piecewise cubics of the coefficients, to one rounding of fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsde import VPSDE
from fastsde.interpolation import interpolate
from fastsde.objective import Objective

OBJECTIVES = {
    "score": Objective(),
    "v": Objective(prediction="v", weighting="likelihood"),
    "x0": Objective(VPSDE(0.0, 60.0), "x0", t_min=0.01),
    "flow": Objective(prediction="flow", weighting="target", t_min=1e-6, t_max=0.9),
    "edm": Objective(VPSDE(5, 5), "x0", "target", "edm"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_right_to_a_rounding(name: str) -> None:
    objective = OBJECTIVES[name]
    low, high, found = objective.t_min, objective.last_time, objective.interpolation
    assert found is not None
    assert found is objective.interpolation  # created once
    t = torch.cat([torch.logspace(-6, 0, 5000), torch.rand(5000), torch.tensor([low, high])]).clamp(low, high)
    ours, exact = found.at(t)[:, :6].double(), objective.table(t, torch.float64)
    # If a coefficient passes through zero, relative to its neighbours.
    scale = torch.maximum(exact.abs(), torch.tensor([2e-2 if name == "edm" else 0.0] + [0.0] * 5))
    assert ((ours - exact).abs() <= 1.3 * 2.0**-23 * scale).all()


@pytest.mark.parametrize("low", [1e-8, 1e-4, 0.3, 1.0])
def test_bounds_of_any_size(low: float) -> None:
    found = interpolate(lambda t: torch.stack([t, torch.ones_like(t)], -1), low, 8 * low)
    assert found is not None
    t = torch.linspace(low, 8 * low, 100)
    assert torch.equal(found.at(t)[:, 0], t)
    assert torch.equal(found.at(t)[:, 1:3], torch.tensor([1.0, 0.0]).expand(100, 2))


def _jump(t: Tensor) -> Tensor:
    return (t > 0.3).double()[:, None]


def _wild(t: Tensor) -> Tensor:
    return torch.sin(1e6 * t)[:, None]


@pytest.mark.parametrize(
    ("table", "low"), [(_jump, 0.1), (_wild, 0.1), (lambda t: torch.nan * t[:, None], 0.5), (_jump, 1e-38)]
)
def test_what_has_no_exact_cubics_has_none(table: Any, low: float) -> None:
    assert interpolate(table, low, 1.0) is None
