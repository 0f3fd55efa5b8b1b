"""The kernel of the data order agrees exactly with the reference, for data of any size."""

from __future__ import annotations

import pytest
import torch

from fastsde import noise, ops, reference

# One row, a few, the most for 24 bits and the fewest for 48, the largest N for which N times a 24-bit word is exact in
# float64, the next one, and one for which N itself is rounded in float64.
SIZES = [1, 3, 60_000, 2**24, 2**24 + 1, 2**29 - 1, 2**29 + 1, 2**40 + 12345, 2**53 + 1]


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (5, 7), (2, 128), (3, 129)])
def test_rows_are_those_of_the_reference(triton_device: torch.device, steps: int, batch: int, n: int) -> None:
    first = int(torch.randint(2**28 - steps, ()))
    keys = noise.sample_keys(int(torch.randint(2**62, ())), batch, device=triton_device)
    counter = torch.full((1,), first, device=triton_device)
    padded = torch.full((steps + 1, batch + 3), -1, device=triton_device)
    ops.data_order(keys, counter, n, padded[:steps, :batch])
    numbers = torch.arange(first, first + steps, device=triton_device)
    assert torch.equal(padded[:steps, :batch], reference.data_order(keys, numbers, n)), (first, keys)
    assert (padded[steps:] == -1).all()
    assert (padded[:, batch:] == -1).all()
    assert torch.equal(padded[0, :batch], reference.data_order(keys, first, n))
    assert counter.item() == first


def test_a_row_must_be_contiguous(triton_device: torch.device) -> None:
    keys = noise.sample_keys(0, 4, device=triton_device)
    counter, out = torch.zeros(1, dtype=torch.int64, device=triton_device), keys.new_zeros(4, 3).T
    with pytest.raises(ValueError, match="each contiguous"):
        ops.data_order(keys, counter, 9, out)
    ops.data_order(keys, counter, 9, out[:0])
    assert not out.any()
