"""The kernel of normals compared with the noise contract in PyTorch."""

from __future__ import annotations

import pytest
import torch

from fastsde import noise, ops

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [0, 1, 15])
@pytest.mark.parametrize(
    ("batch", "shape"), [(1, ()), (300, (1,)), (3, (2,)), (300, (63,)), (2, (2048,)), (3, (1000,)), (1, (2**16 + 17,))]
)
def test_normals_are_those_of_the_contract(
    device: torch.device, batch: int, shape: tuple[int, ...], stream: int
) -> None:
    step = int(torch.randint(2**28, ()))
    keys = noise.sample_keys(int(torch.randint(2**62, ())), batch, device=device)
    found = ops.normal(keys, step, shape, stream)
    assert found.shape == (batch, *shape)
    torch.testing.assert_close(found, noise.normal(keys, step, shape, stream), rtol=0, atol=4e-6)


def test_check_values(device: torch.device) -> None:
    keys = noise.sample_keys(0, 4, device=device)
    first = torch.tensor([0.061111, 0.278528, 1.07155, -0.384063, -0.706985, -0.260079], device=device)
    torch.testing.assert_close(ops.normal(keys, 0, (6,))[0], first, rtol=0, atol=1e-5)
    other = torch.tensor([-1.43479, -1.968736, 0.687393, -0.509065, -0.083482, -0.968692], device=device)
    torch.testing.assert_close(ops.normal(keys, 1, (6,))[3], other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch", "shape"), [(0, (3,)), (3, (0,)), (0, ())])
def test_nothing_becomes_nothing(device: torch.device, batch: int, shape: tuple[int, ...]) -> None:
    assert ops.normal(noise.sample_keys(0, batch, device=device), 0, shape).shape == (batch, *shape)


def test_keys_may_be_strided(device: torch.device) -> None:
    keys = noise.sample_keys(0, 6, device=device)
    strided = torch.stack([keys, keys], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(ops.normal(strided, 3, (5,)), ops.normal(keys, 3, (5,)))
