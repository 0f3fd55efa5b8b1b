"""Times and coefficients computed by kernels, compared with `fastsde.objective`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsde import VPSDE, noise, ops
from fastsde.objective import Objective

OBJECTIVES = [Objective(prediction="v"), Objective(VPSDE(0.1, 5.0), "x0", "target", "edm", t_min=0.01)]
BOUND = 1.3 * 2.0**-23  # the interpolation (tests/test_interpolation.py), and two roundings of its cubics


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_times_are_those_of_the_contract_to_the_bit(device: torch.device, batch: int, steps: int) -> None:
    keys, first = noise.sample_keys(5, batch, device=device), 2**28 - 4
    numbers = torch.arange(first, first + steps, device=device)
    expected = Objective().draw(noise.uniform(keys, numbers, (), noise.STREAM_TRAINING_TIME))
    assert torch.equal(ops.training_times(Objective(), keys, first, steps), expected)
    counted = ops.training_times(Objective(), keys, 4, steps, counter=torch.tensor([first - 4], device=device))
    assert torch.equal(counted, expected)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("objective", [*OBJECTIVES, Objective(times="lognormal")], ids=["v", "edm", "lognormal"])
def test_those_of_a_step_are_those_of_its_times(device: torch.device, objective: Objective, steps: int) -> None:
    keys = noise.sample_keys(3, 300, device=device)
    expected = ops.coefficients(objective, ops.training_times(objective, keys, 9, steps))
    assert torch.equal(ops.step_coefficients(objective, keys, 9, steps), expected)
    counted = ops.step_coefficients(objective, keys, 2, steps, counter=torch.tensor([7], device=device))
    assert torch.equal(counted, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(), (1,), (300,), (3, 5), (0,)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["v", "edm"])
def test_coefficients_are_right_to_rounding(device: torch.device, objective: Objective, shape: tuple[int, ...]) -> None:
    t = objective.draw(torch.rand(shape, device=device))
    table = ops.coefficients(objective, t)
    exact = objective.table(t, torch.float64)
    assert table.shape == (*shape, 6)
    assert table.is_contiguous()
    scale = exact.abs()
    scale[..., 0] = scale[..., 0].clamp(min=0.02)  # c_noise passes through zero
    assert ((table.double() - exact).abs() <= BOUND * scale).all()


def test_both_ends_are_inside(device: torch.device) -> None:
    for objective in (*OBJECTIVES, Objective(t_min=0.25, t_max=0.5), Objective(t_min=0.3, t_max=0.7)):
        t = torch.tensor([objective.t_min, objective.last_time], device=device)
        torch.testing.assert_close(ops.coefficients(objective, t), objective.table(t), rtol=4e-7, atol=1e-8)


def _outside() -> Tensor:
    return torch.tensor([0.5, 0.0, -0.5, 1e-6, 3.0, torch.inf, torch.nan])


@pytest.mark.usefixtures("native")
def test_other_times_are_computed_on_the_cpu() -> None:
    for t in (_outside(), torch.rand(5).double(), torch.rand(2, 5).mT[:, :1].expand(5, 3)):
        assert torch.equal(ops.coefficients(OBJECTIVES[0], t).isnan(), OBJECTIVES[0].table(t).isnan())
        torch.testing.assert_close(ops.coefficients(OBJECTIVES[0], t), OBJECTIVES[0].table(t), equal_nan=True)


def test_other_times_are_nan_where_nobody_waits_for_them(triton_device: torch.device) -> None:
    table = ops.coefficients(OBJECTIVES[0], _outside().to(triton_device))
    assert table.isnan().any(1).tolist() == [False] + [True] * 6
