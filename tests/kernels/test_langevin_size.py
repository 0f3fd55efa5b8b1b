"""The sizes of the steps of a Langevin row, and steps with them, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsde import StepTable, noise, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES: list[Any] = [(1, (1,)), (65, (2,)), (3, (1000,))]
SHAPES += [pytest.param(*each, marks=pytest.mark.slow) for each in ((33, (63,)), (2, (5, 1001)), (4, (2048,)))]


def table(slots: int, rows: int = 3) -> StepTable:
    """Returns a table whose middle row is a Langevin row, with other numbers in each slot."""
    values = torch.linspace(-0.9, 1.1, rows * slots, dtype=torch.float64).reshape(rows, slots)
    A = values[:, :, None] * values[:, None] / 2
    b, snr = values.clone(), torch.zeros(rows, dtype=torch.float64)
    b[1], snr[1] = 0, 0.3
    eps_max = torch.full_like(snr, 2.0)  # binds for some single elements
    columns = {"p": values / 2, "q": values[:, 0], "b": b, "e": values, "d": values}
    return StepTable(values[:, 0] ** 2, A=A, **columns, snr=snr, eps_max=eps_max)


def call(
    batch: int, shape: Sequence[int], device: torch.device, slots: int, guides: bool
) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    torch.manual_seed(batch)

    def draw() -> Tensor:
        return torch.randn(batch, *shape, device=device)

    given: dict[str, Any] = {"keys": noise.sample_keys(batch, batch, device=device)}
    if guides:
        given |= {"f_uncond": draw(), "guidance": torch.linspace(-1, 3, batch, device=device), "rescale": 0.5}
    return [draw() for _ in range(slots)], draw(), given


def exact(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


@pytest.mark.parametrize(("batch", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize(("slots", "guides"), [(1, False), (3, True)])
def test_a_step_is_that_of_the_reference(
    device: torch.device, batch: int, shape: tuple[int, ...], slots: int, guides: bool
) -> None:
    pc = table(slots)
    states, f, given = call(batch, shape, device, slots, guides)
    ours = ops.solver_step(states, f, pc, 1, **given)
    theirs = reference.solver_step([each.double() for each in states], f.double(), pc, 1, **exact(given))
    for mine, right in zip(ours, theirs, strict=True):
        # Sums of up to 5,005 squares, and normals that differ by 4e-6; a single element may have a tiny gradient.
        torch.testing.assert_close(mine.double(), right, rtol=2e-5, atol=2e-5 * float(right.abs().max()))
    # A sample does not depend on its batch, to the bit.
    last = {k: v[-1:] if isinstance(v, Tensor) else v for k, v in given.items()}
    alone = ops.solver_step([each[-1:] for each in states], f[-1:], pc, 1, **last)
    assert all(torch.equal(one, whole[-1:]) for one, whole in zip(alone, ours, strict=True))


def test_given_noise_sizes_the_step(device: torch.device) -> None:
    pc, (states, f, _) = table(1), call(3, (7,), device, 1, False)
    z = torch.randn(3, 7, device=device)
    (ours,) = ops.solver_step(states, f.bfloat16(), pc, 1, z=z)
    (right,) = reference.solver_step([states[0].double()], f.bfloat16().double(), pc, 1, z=z.double())
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


def test_without_a_gradient_there_is_no_step(device: torch.device) -> None:
    one = torch.ones(1, dtype=torch.float64)
    pc, x = StepTable(one, one, d=one, e=one, q=one, snr=one), torch.randn(3, 5, device=device)
    f = torch.zeros_like(x)
    f[1] = 1
    (ours,) = ops.solver_step([x], f, pc, 0, keys=noise.sample_keys(0, 3, device=device))
    assert torch.equal(ours[0], x[0])
    assert torch.equal(ours[2], x[2])
    assert not torch.equal(ours[1], x[1])
    (nothing,) = ops.solver_step([x[:0]], f[:0], pc, 0, keys=noise.sample_keys(0, 0, device=device))
    assert nothing.shape == (0, 5)


def test_a_counter_gives_the_row_and_other_rows_have_sizes_of_one(triton_device: torch.device) -> None:
    module = importlib.import_module("fastsde.kernels.langevin_size")
    pc = table(2)
    states, f, given = call(3, (9,), triton_device, 2, False)
    rows, langevin = ops.device_table(pc, triton_device), pc.langevin.float().to(triton_device)
    for row in range(3):
        counter, sizes = torch.tensor([row], device=triton_device), torch.empty(3, 2, device=triton_device)
        module.langevin_size(
            states, f, rows, 0, langevin=langevin, terms=pc.terms(), counter=counter, sizes=sizes, **given
        )
        assert int(counter) == row
        k = pc.row(row)
        g = sum(p * s.double() for p, s in zip(k.p, states, strict=True)) + k.q * f.double()
        z = noise.normal(given["keys"], row + 1, (9,)).double()
        eps = reference.langevin_size(g, z, k.snr, k.eps_max) if k.snr else torch.ones(3, device=triton_device).double()
        expected = torch.stack((eps, (2 * eps).sqrt() if k.snr else eps), dim=1)
        torch.testing.assert_close(sizes.double(), expected, rtol=1e-5, atol=0)
