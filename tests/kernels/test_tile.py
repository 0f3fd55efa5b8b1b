"""How a batch is cut into tiles, and that small and large tiles give the same results."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from tables import random_table
from torch import Tensor

from fastsde import VPSDE, noise, ops, reference, solvers

tile = pytest.importorskip("fastsde.kernels.tile")
pytestmark = pytest.mark.usefixtures("poisoned")

FEW, MANY, H100 = 2**62, 0, 2 * 132  # `tile._MANY`: small tiles for everything, large ones, and as on a GPU
SDE = VPSDE()
TABLE = solvers.build("ddpm", SDE, 6, prediction="eps", clip=2.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 63, 784, 2047, 2048, 2049, 2**28])
@pytest.mark.parametrize("batch", [1, 3, 20, 511, 513, 10**6])
def test_tiles_cover_a_batch(monkeypatch: pytest.MonkeyPatch, batch: int, size: int) -> None:
    kinds = []
    for many in (FEW, MANY, H100):
        monkeypatch.setattr(tile, "_MANY", many)
        constants, grid = tile.tiling(batch, size)
        rows, columns = grid if constants["ROWS_FIRST"] else grid[::-1]
        assert (rows - 1) * constants["S"] < batch <= rows * constants["S"]
        assert (columns - 1) * constants["P"] * 4 < size <= columns * constants["P"] * 4
        assert grid[0] < 2**31
        assert grid[1] < 2**16 or batch * size > 2**42  # which no memory holds
        kinds.append(constants)
    assert kinds[2] in kinds[:2]  # two variants at most


def test_few_elements_fill_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "_MANY", H100)
    assert math.prod(tile.tiling(20, 784).grid) >= 132
    large = tile.tiling(10_000, 784)
    assert large.constants == {"S": 2, "P": 256, "ALIGNED": True, "ROWS_FIRST": True, "num_warps": 4}
    assert large.grid == (5_000, 1)


def _results(device: torch.device, batch: int, size: int) -> Iterator[Tensor]:
    """Returns the results of every kernel that works on tiles."""
    keys = noise.sample_keys(5, batch, device=device)
    x, f, z = (ops.normal(keys, step, (size,)) for step in range(3))
    yield from (x, *ops.solver_step([x], f, TABLE, 1, keys=keys))
    yield from ops.solver_step([x, f, z], f, random_table(3, seed=1, clip=1.0), 1, keys=keys)
    coefficients = torch.linspace(-1, 1, 6 * batch, device=device).reshape(batch, 6)
    yield from ops.perturb(x, keys, 4, coefficients, keep_noise=True)
    f.requires_grad_()
    loss = ops.dsm_loss(f, x, keys, 4, coefficients)
    torch.testing.assert_close(loss, reference.dsm_loss(f, x, keys, 4, coefficients), rtol=1e-5, atol=0)
    yield torch.autograd.grad(loss, f)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "size"),
    [(1, 1), (70, 2), (5, 61), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 131), (3, 520)))],
)
def test_small_and_large_tiles_give_the_same_bits(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, batch: int, size: int
) -> None:
    monkeypatch.setattr(tile, "_MANY", FEW)
    small = list(_results(triton_device, batch, size))
    assert tile.tiling(batch, size).constants["num_warps"] == 1
    monkeypatch.setattr(tile, "_MANY", MANY)
    for ours, theirs in zip(small, _results(triton_device, batch, size), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.isnan().any()


def test_a_counter_has_a_slot_for_each_small_tile(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "_MANY", FEW)
    x = noise.normal(noise.sample_keys(0, 3, device=triton_device), 0, (300,))
    counter = ops.step_counter(3, 300, triton_device)
    assert len(counter) == 9
    keys, time, status = noise.sample_keys(1, 3, device=triton_device), x.new_zeros(3), ops.new_status(triton_device)
    expected, rows = x, ops.device_table(TABLE, triton_device)
    given = {"network_input": None, "f_uncond": None, "clip": TABLE.clip, "terms": TABLE.terms()}
    x = x.clone()
    for row in range(2):
        ops.counted_step([x], -x, rows, counter, out=[x], time=time, status=status, keys=keys, **given)
        (expected,) = ops.solver_step([expected], -expected, TABLE, row, keys=keys)
        assert torch.equal(x, expected)
        assert (counter == row + 1).all()
