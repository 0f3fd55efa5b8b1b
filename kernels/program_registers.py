"""The registers of the Triton kernel ``mlp_sampler``, in which a program's instructions (`program_blocks`) compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIXED = (0.0, -1.0, *map(float, range(64)))  # zero, and the numbers of units, -1 for none
_NONE = 1  # where -1 is in it
ZERO, FINITE, ANY = range(3)  # what is known of a register's padding


class Buffer:
    """The numbers of a buffer: each is an element of a source, times a factor."""

    def __init__(self) -> None:
        self.size = 0
        self._elements: list[Tensor] = []
        self._factors: list[float] = []

    def add(self, elements: Tensor, factor: float = 1.0) -> int:
        """Appends elements of the source, and returns their offset."""
        offset = self.size
        self.size += elements.numel()
        self._elements.append(elements.reshape(-1))
        self._factors.append(factor)
        return offset

    def elements(self) -> Tensor:
        """Returns the elements, int64 ``[size]``."""
        return torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *self._elements])

    def factors(self) -> Tensor:
        """Returns the factors, fp32 ``[size]``."""
        pairs = zip(self._elements, self._factors, strict=True)
        each = [torch.full((len(elements),), factor, dtype=torch.float32, device="cpu") for elements, factor in pairs]
        return torch.cat([torch.zeros(0, dtype=torch.float32, device="cpu"), *each])


class Unit(NamedTuple):
    """A unit of a register."""

    register: int
    unit: int


class Registers:
    """The kernel's instructions and their registers.

    Attributes:
        code: the instructions.
        widths: of all registers.
        weights, constants: what these buffers hold. Their source is `FIXED`, then the `sources`.
        rows: what a row of the numbers that follow the row holds. Its source is zero, then the row of the program.
        sources: the matrices and the constants that are used, ("matrix" or "constant", number) each.

    Args:
        width, count: of register 0, with padding and without.
    """

    def __init__(self, width: int, count: int) -> None:
        self.code: list[tuple[Any, ...]] = []
        self.weights, self.constants, self.rows = Buffer(), Buffer(), Buffer()
        self.sources: dict[tuple[str, int], int] = {}  # with the place of their first element
        self.widths, self.counts, self.padding = [width], [count], [ZERO]
        self._end = len(FIXED)
        self._known: dict[Any, int] = {}

    def emit(self, instruction: tuple[Any, ...], width: int, count: int, padding: int) -> int:
        """Adds an instruction, unless its result is known, and returns its register."""
        if instruction not in self._known:
            self.code.append(instruction)
            self.widths.append(width)
            self.counts.append(count)
            self.padding.append(ZERO if count == width else padding)
            self._known[instruction] = len(self.code)
        return self._known[instruction]

    def gathered(self, units: Sequence[Unit], width: int) -> int:
        """Returns a register with these units; if all of them are the same, that is a column."""
        register = units[0].register
        fits = self.widths[register] == width and self.counts[register] == len(units)
        if fits and all(each == Unit(register, i) for i, each in enumerate(units)):
            return register
        if all(each == units[0] for each in units) and (len(units) > 1 or width == 1):
            if self.widths[register] == 1:
                return register
            return self.emit(("unit", register, units[0].unit), 1, 1, ZERO)
        sources = []
        for register in dict.fromkeys(each.register for each in units):
            numbers = [each.unit if each.register == register else -1 for each in units]
            numbers += [-1] * (width - len(numbers))
            offset = self._numbers(tuple(numbers))
            sources.append((register, offset))
        return self.emit(("gather", width, tuple(sources)), width, len(units), ZERO)

    def _numbers(self, numbers: tuple[int, ...]) -> int:
        if numbers not in self._known:
            self._known[numbers] = self.constants.add(torch.tensor(numbers, device="cpu") + _NONE + 1)
        return self._known[numbers]

    def clean(self, register: int, zero: bool = False) -> int:
        """Returns a register whose padding is finite, or zero."""
        if self.padding[register] <= (ZERO if zero else FINITE):
            return register
        count = self.counts[register]
        return self.emit(("mask", register, count), self.widths[register], count, ZERO)

    def spread(self, register: int, count: int, width: int) -> int:
        """Returns a register as a block, if it is a column."""
        if self.widths[register] == width:
            return register
        numbers = self._numbers((*[0] * count, *[-1] * (width - count)))
        return self.emit(("gather", width, ((register, numbers),)), width, count, ZERO)

    def vector(self, b: Any, first: int, count: int, width: int, factor: float = 1.0) -> tuple[str, int, int]:
        """Returns numbers ``first`` to ``first + count - 1`` of a vector as an operand, times a factor."""
        kind = "row" if b.is_row else "constant"
        key = kind, b.number, first, count, width, factor
        if key not in self._known:
            elements = torch.zeros(max(16, width), dtype=torch.int64, device="cpu")
            start = 1 + b.number if b.is_row else self.source("constant", b.number, b.width)
            elements[:count] = start + first + torch.arange(count, device="cpu")
            self._known[key] = (self.rows if b.is_row else self.constants).add(elements, factor)
        return kind, self._known[key], width

    def source(self, kind: str, number: int, size: int) -> int:
        """Returns where a matrix or a constant starts in the source."""
        if (kind, number) not in self.sources:
            self.sources[kind, number] = self._end
            self._end += size
        return self.sources[kind, number]
