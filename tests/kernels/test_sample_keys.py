"""The kernel of keys agrees exactly with the noise contract in PyTorch."""

from __future__ import annotations

import random

import pytest
import torch

from fastsde import noise, ops

pytestmark = pytest.mark.usefixtures("poisoned")

EDGES = [0, 1, 2**31 - 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def _random() -> int:
    return random.SystemRandom().getrandbits(64)  # new ones in every run, shown on failure


@pytest.mark.parametrize("n", [1, 2, 7, 127, 128, 129, 1030])
def test_keys_are_those_of_the_contract(device: torch.device, n: int) -> None:
    for seed, first in [(_random(), _random()), (_random(), 2**64 - n // 2 - 1), (2**64 - 1, 2**32 - n // 2)]:
        found = ops.sample_keys(seed, n, first, device=device)
        assert torch.equal(found, noise.sample_keys(seed, n, first, device=device)), (seed, first)
        assert found.shape == (n, 2)
        assert found.dtype == torch.int64
        assert found.device == device


@pytest.mark.slow
def test_seeds_and_samples_of_all_sizes(device: torch.device) -> None:
    for seed in EDGES:
        for first in EDGES:
            expected = noise.sample_keys(seed, 3, first, device=device)
            assert torch.equal(ops.sample_keys(seed, 3, first, device=device), expected), (seed, first)


def test_check_value(device: torch.device) -> None:
    # Random123, kat_vectors: philox4x32 10, with a counter and key of zeros.
    words = ops.sample_keys(0, 1, device=device).view(torch.int32)[0] & 0xFFFFFFFF
    assert words.tolist() == [w - 2**32 if w >= 2**31 else w for w in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]


def test_no_samples_have_no_keys(device: torch.device) -> None:
    assert ops.sample_keys(3, 0, 5, device=device).shape == (0, 2)


def test_bad_arguments_are_named(device: torch.device) -> None:
    for arguments, error, message in [
        ((-1, 3), ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        ((2**64, 3), ValueError, r"seed must be in \[0, 2\^64\)"),
        ((0.5, 3), TypeError, "seed must be an int, got float"),
        ((0, -1), ValueError, "n must be at least 0, got -1"),
        ((0, 3, 2**64), ValueError, r"first_sample must be in \[0, 2\^64\)"),
    ]:
        with pytest.raises(error, match=message):
            ops.sample_keys(*arguments, device=device)


def test_compiled_code_takes_it_whole(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda seed, first: ops.sample_keys(seed, 4, first, device=device), backend="eager", fullgraph=True
    )
    for seed, first in [(1, 2), (3, 4), (5, 2**64 - 2)]:
        assert torch.equal(compiled(seed, first), noise.sample_keys(seed, 4, first, device=device))
    arguments = (3, 4, 5, device)
    torch.library.opcheck(torch.ops.fastsde.sample_keys, arguments, test_utils=("test_schema", "test_faketensor"))
