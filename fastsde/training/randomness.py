"""Random numbers of other people's code, such as dropout and random crops, as a function of the run's seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["generator_of", "seeded", "seeded_everywhere"]


def generator_of(device: torch.device) -> torch.Generator:
    """Returns PyTorch's own generator of a device, which layers such as dropout draw from."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


@contextmanager
def seeded(generator: torch.Generator, *place: int) -> Iterator[None]:
    """Seeds a generator by a place in a run, such as (seed, step), and then gives it its state back."""
    state = generator.get_state()
    try:
        generator.manual_seed(_seed(place))
        yield
    finally:
        generator.set_state(state)


@contextmanager
def seeded_everywhere(*place: int) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and PyTorch on the CPU, and then gives them their states back."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (what transforms use)
    seed = _seed(place)
    try:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        with seeded(torch.default_generator, *place):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _seed(place: tuple[int, ...]) -> int:
    low, high = (int(each) for each in np.random.SeedSequence(place).generate_state(2))
    return (high << 32 | low) >> 1
