"""Seeds from PyTorch's generators, and random numbers of other people's code (dropout, random crops) by their place."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .validation import check_int

__all__ = ["Seed", "generator_of", "preserved", "seed_everywhere", "seed_of", "seeded"]

Seed = int | torch.Generator | None
"""A seed in [0, 2^64), or what one is drawn from: a generator, or PyTorch's global one for None."""

_MASK = 2**64 - 1
_logger = logging.getLogger("fastsde")


def seed_of(seed: Seed) -> int:
    """Returns a seed in [0, 2^64): the given one, or a new one drawn from a generator or, for None, PyTorch's own.

    A drawn seed is logged by the logger "fastsde", at the level INFO.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if seed is not None and not isinstance(seed, torch.Generator):
        return check_int("seed", seed, 0, 2**64)
    device = "cpu" if seed is None else seed.device
    drawn = int(torch.randint(2**63 - 1, (), generator=seed, dtype=torch.int64, device=device))
    _logger.info("seed %d was drawn", drawn)
    return drawn


def generator_of(device: torch.device) -> torch.Generator:
    """Returns PyTorch's own generator of a device, which layers such as dropout draw from."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


@contextmanager
def seeded(generator: torch.Generator, *place: int) -> Iterator[None]:
    """Seeds a generator by a place, such as (seed, step), and then gives it its state back."""
    state = generator.get_state()
    try:
        generator.manual_seed(_seed(place))
        yield
    finally:
        generator.set_state(state)


@contextmanager
def preserved() -> Iterator[None]:
    """Gives the generators of Python, NumPy and PyTorch on the CPU their states back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (what transforms use)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_everywhere(*place: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch on the CPU by a place."""
    seed = _seed(place)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def _seed(place: tuple[int, ...]) -> int:
    """Mixes a place to a seed in [0, 2^63) by SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number
    generators"); NumPy's SeedSequence takes many times as long.
    """
    mixed = 0
    for each in place:
        mixed = (mixed ^ each) + 0x9E3779B97F4A7C15 & _MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
        mixed ^= mixed >> 31
    return mixed >> 1
