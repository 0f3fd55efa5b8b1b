"""Where each element of a tensor comes from.

While a network is lowered, a tensor that follows the state is a tensor of codes, of the same shape: the sample that the
element belongs to, and a number that stands for a unit of a program's value, or for an element of a tensor that is
known ahead. So what only moves elements (views, slices, concatenations) is done by running the operation itself on
codes.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recording import NotLowered, Value

__all__ = ["Elements", "Run", "are_the_same", "coded", "numbers_of", "of_samples", "positions_of", "samples_in"]

_SHIFT = 32
_ANY = 1 << 20  # the sample of what is the same for all samples


@dataclass(frozen=True)
class Run:
    """Neighbouring elements of one source, or one element repeated (step 0)."""

    source: int | Value  # a value of the program, or a tensor that is known ahead
    first: int
    length: int
    step: int


class Elements:
    """Numbers all elements of all sources."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._sources: list[int | Value] = []
        self._size = 0
        self._known: dict[int | Value, int] = {}

    def base(self, source: int | Value, size: int) -> int:
        """Returns the number of the first element of a source."""
        if source not in self._known:
            self._known[source] = self._size
            self._bases.append(self._size)
            self._sources.append(source)
            self._size += max(1, size)
        return self._known[source]

    def runs(self, numbers: Tensor) -> list[Run]:
        """Returns the elements of these numbers as runs."""
        runs: list[Run] = []
        for number in numbers.tolist():
            at = bisect.bisect_right(self._bases, number) - 1
            source, element = self._sources[at], number - self._bases[at]
            last = runs[-1] if runs else None
            if last is not None and last.source == source:
                step = element - (last.first + (last.length - 1) * last.step)
                if step in (0, 1) and (last.length == 1 or step == last.step):
                    runs[-1] = Run(source, last.first, last.length + 1, step)
                    continue
            runs.append(Run(source, element, 1, 1))
        return runs


def coded(base: int, shape: Sequence[int], sample_dim: int | None = None) -> Tensor:
    """Returns the codes of a source of a shape.

    Args:
        sample_dim: the dimension along which samples differ, whose elements then share their numbers; None for a source
            that is the same for all samples.
    """
    if sample_dim is None:
        count = torch.Size(shape).numel()
        return (torch.arange(count, device="cpu") + base).reshape(shape) + (_ANY << _SHIFT)
    rest = [size for i, size in enumerate(shape) if i != sample_dim]
    numbers = (torch.arange(torch.Size(rest).numel(), device="cpu") + base).reshape(rest).unsqueeze(sample_dim)
    samples = torch.arange(shape[sample_dim], device="cpu")
    view = [1] * len(shape)
    view[sample_dim] = -1
    return numbers + (samples.reshape(view) << _SHIFT)


def of_samples(numbers: Tensor, batch: int) -> Tensor:
    """Returns the codes ``[batch, width]`` of elements that each sample has its own of."""
    return numbers[None] + (torch.arange(batch, device="cpu")[:, None] << _SHIFT)


def are_the_same(codes: Tensor) -> Tensor:
    """Returns which elements are the same for all samples."""
    return codes >> _SHIFT == _ANY


def numbers_of(codes: Tensor) -> Tensor:
    """Returns the numbers of elements."""
    return codes & ((1 << _SHIFT) - 1)


def samples_in(batch: int, *operands: Tensor) -> Tensor:
    """Returns the sample of each position of operands of one shape.

    Raises:
        NotLowered: if an element of the result would depend on two samples.
    """
    samples = torch.full_like(operands[0], _ANY)
    for codes in operands:
        own = codes >> _SHIFT
        if bool(((own != samples) & (own != _ANY) & (samples != _ANY)).any()):
            raise NotLowered("it mixes samples")
        samples = torch.where(samples == _ANY, own, samples)
    unknown = samples == _ANY
    if bool(unknown.any()):
        for dim in range(samples.ndim):
            if samples.shape[dim] != batch:
                continue
            view = [1] * samples.ndim
            view[dim] = -1
            along = torch.arange(batch, device="cpu").reshape(view).expand_as(samples)
            if bool((unknown | (samples == along)).all()):
                return along
        raise NotLowered("it mixes samples")
    return samples


def positions_of(samples: Tensor, batch: int) -> Tensor:
    """Returns the flat positions of the elements of each sample, int64 ``[batch, width]``.

    Raises:
        NotLowered: if samples have different numbers of elements.
    """
    flat = samples.reshape(-1)
    if len(flat) % batch or bool((torch.bincount(flat, minlength=batch) * batch != len(flat)).any()):
        raise NotLowered("it mixes samples")
    return torch.argsort(flat, stable=True).reshape(batch, -1)
