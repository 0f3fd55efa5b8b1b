"""Seeds that are given, and seeds that are drawn from a generator."""

from __future__ import annotations

import logging

import pytest
import torch

import fastsde
from fastsde import Sampler, distributed
from fastsde.randomness import seed_of


def network(x, t):
    return -x


SAMPLER = Sampler(network, (2,), steps=3)


def test_a_generator_gives_the_same_seeds_again() -> None:
    generator = torch.Generator().manual_seed(3)
    first = [seed_of(generator), seed_of(generator)]
    assert first[0] != first[1]
    generator.manual_seed(3)
    assert [seed_of(generator), seed_of(generator)] == first
    assert all(0 <= seed < 2**63 for seed in first)


def test_none_draws_from_the_global_generator_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO, "fastsde"):
        x = SAMPLER(4, seed=None)
    seed = SAMPLER.last_seed
    assert caplog.messages == [f"seed {seed} was drawn"]
    assert torch.equal(SAMPLER(4, seed=seed), x)
    torch.manual_seed(5)
    assert torch.equal(fastsde.sample(network, (4, 2), steps=3, seed=None), x)
    assert not torch.equal(SAMPLER(4, seed=None), x)


def test_a_generator_of_ones_own_leaves_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    x = SAMPLER(4, seed=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fastsde.sample(network, (4, 2), steps=3, seed=torch.Generator().manual_seed(1)), x)


def test_given_seeds_are_told_and_draw_nothing() -> None:
    state = torch.get_rng_state()
    SAMPLER(1, seed=2**64 - 1)
    assert SAMPLER.last_seed == 2**64 - 1
    SAMPLER(1, keys=[7])
    assert SAMPLER.last_seed is None
    assert torch.equal(torch.get_rng_state(), state)


def test_one_process_draws_as_a_sampler_does() -> None:
    drawn = distributed.sample(SAMPLER, 4, seed=torch.Generator().manual_seed(9))
    assert torch.equal(drawn, SAMPLER(4, seed=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("seed", [None, torch.Generator()])
def test_keys_and_a_seed_exclude_each_other(seed: object) -> None:
    with pytest.raises(ValueError, match="keys replace seed and first_sample"):
        SAMPLER(1, keys=[7], seed=seed)
