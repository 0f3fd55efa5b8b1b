"""The factor of rescaled guidance, and steps with weights that differ by sample and row, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsde import VPSDE, ops, reference, solvers
from fastsde.ops import dispatch

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES: list[Any] = [(1, (1,)), (65, (2,)), (3, (1000,))]
SHAPES += [pytest.param(*each, marks=pytest.mark.slow) for each in ((33, (63,)), (2, (5, 1001)), (4, (2048,)))]


def outputs(batch: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch)
    mean = 3.0  # larger than the deviation, which sums of squares without their mean would lose
    f, f_uncond = (mean + torch.randn(batch, *shape, device=device) for _ in range(2))
    return f.to(dtype), f_uncond.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("batch", "shape"), SHAPES, ids=str)
def test_the_factor_is_that_of_the_reference(
    device: torch.device, batch: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    f, f_uncond = outputs(batch, shape, device, dtype)
    scale, rates = torch.linspace(-2, 5, batch, device=device), torch.tensor([0.0, 1.5], device=device)
    factor = torch.full((batch + 1,), torch.nan, device=device)
    ops.rescale_factor(f, f_uncond, 1, scale=scale, rates=rates, phi=0.75, factor=factor[:batch])
    w = (1.5 * scale.double()).reshape(-1, *[1] * len(shape))
    g = f_uncond.double() + w * (f.double() - f_uncond.double())
    expected = reference.rescale_factor(f.double(), g, 0.75)
    # g is rounded to 2^-24 of numbers of up to 40, where it deviates by more than 1/2.
    assert (factor[:batch].double() - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert factor[batch].isnan()
    # A sample does not depend on its batch, to the bit.
    alone = torch.empty(1, device=device)
    ops.rescale_factor(f[-1:], f_uncond[-1:], 1, scale=scale[-1:], rates=rates, phi=0.75, factor=alone)
    assert torch.equal(alone, factor[batch - 1 : batch])


def test_a_counter_gives_the_row_and_is_only_read(triton_device: torch.device) -> None:
    module = importlib.import_module("fastsde.kernels.guidance_rescale")
    f, f_uncond = outputs(5, (7,), triton_device, torch.float32)
    scale, rates = f[:, 0].contiguous(), torch.tensor([1.0, 9.0, 2.0], device=triton_device)
    found, counter = [torch.empty(5, device=triton_device) for _ in range(2)], torch.tensor([2], device=triton_device)
    given = {"scale": scale, "rates": rates, "phi": 1.0}
    module.rescale_factor(f, f_uncond, 0, counter=counter, factor=found[0], **given)
    module.rescale_factor(f, f_uncond, 2, factor=found[1], **given)
    assert torch.equal(*found)
    assert int(counter) == 2


def test_nothing_varies_or_nothing_is_there(device: torch.device) -> None:
    one, given = torch.ones(2, 5, device=device), {"scale": torch.ones(2, device=device), "phi": 1.0}
    factor = torch.empty(2, device=device)
    ops.rescale_factor(one, one, 0, factor=factor, **given)
    assert factor.tolist() == [1.0, 1.0]
    ops.rescale_factor(one[:0], one[:0], 0, scale=factor[:0], phi=1.0, factor=factor[:0])


@pytest.mark.parametrize(("batch", "shape"), [(1, ()), (65, (3,)), (2, (2, 1100))], ids=str)
def test_a_step_takes_one_weight_a_sample(device: torch.device, batch: int, shape: tuple[int, ...]) -> None:
    x, w = torch.randn(batch, *shape, device=device), torch.linspace(-1, 4, batch, device=device)
    f, f_uncond = outputs(batch, shape, device, torch.float32)
    table = solvers.build("ddim", VPSDE(), 3, t_end=0.5)
    assert dispatch.has_kernels(device)
    for phi in (0.0, 0.6):
        (ours,) = ops.solver_step([x], f, table, 0, f_uncond=f_uncond, guidance=w, rescale=phi)
        (truth,) = reference.solver_step(
            [x.double()], f.double(), table, 0, f_uncond=f_uncond.double(), guidance=w.double(), rescale=phi
        )
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)


def test_in_float64_and_for_gradients_the_reference_steps() -> None:
    table, w = solvers.build("ddim", VPSDE(), 3), torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.randn(2, 3)
    (step,) = ops.solver_step([x], x, table, 0, f_uncond=-x, guidance=w, rescale=0.5)
    step.sum().backward()
    assert w.grad is not None
    assert w.grad.abs().min() > 0
