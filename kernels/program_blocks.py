"""A network's program (`fastsde.lowering.program`) as the Triton kernel ``mlp_sampler`` runs it: cut into blocks.

A value of the program is a row of *blocks*: tiles of 16, 32 or 64 units, so that a product is never ragged, or single
units, which broadcast ("columns"). Each instruction of the kernel makes one *register*: a block, or a column. Where the
program reads or writes parts of a value, the value is cut there, so that parts are whole blocks. What still does not
fit (elements in another order, cuts that would leave mostly padding) is gathered from other registers, unit by unit.

The units of a block beyond its part of the value are padding. They are zero in a product's result, but a function may
make anything of them, also infinity: before a product multiplies that by zero weights, it is masked.

Instructions of the kernel, as tuples (numbers of registers; register 0 is the network's input):

    "linear", width, start, ((register, block of weights), ...)      start: an operand, or None
    "binary", name, register, operand
    "unary", name, register, p, q
    "fill", width, operand
    "given", first, count, width                                     what each sample is given
    "gather", width, ((register, offset), ...)                       offset: of the units' numbers in the constants
    "unit", register, unit                                           a unit as a column
    "mask", register, count                                          zero from unit ``count`` on
    "mean", factor, squared, ((register, first, end), ...)           of units, or of their squares

An operand is ("register", number, width), or a vector: ("constant", offset, width) or ("row", offset, width).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .program_analysis import BINARY_LOGARITHM, GROUPED, LN_2, LOG2_E, Block, blocks_of, cut, in_binary
from .program_registers import ANY, FINITE, ZERO, Registers, Unit

BINARY = ("add", "subtract", "multiply", "divide")
_DEFAULTS = {"LeakyReLU": 0.01, "ELU": 1.0}  # parameters
# What may be infinite, or NaN, of a number other than zero, and of zero.
_UNBOUNDED = ("exp", "sqrt", "rsqrt", "reciprocal")
_UNBOUNDED_AT_ZERO = ("rsqrt", "reciprocal")


class Blocks(Registers):
    """The kernel's instructions, made one by one from a program's.

    Attributes:
        result: the register of the network's output.
        blocks: (offset, inputs, outputs) of each block of weights, ``[out, in]``.
        widest: the units of the widest value, with padding.
    """

    def __init__(self, program: Any) -> None:
        dim, width = program.dim, blocks_of(program.dim)[1]
        super().__init__(width, dim)
        self.program = program
        self.blocks: list[tuple[int, int, int]] = []
        self._layout = cut(program)
        self._where: dict[int, list[Unit | None]] = {
            value: [None] * size for value, size in enumerate(program.widths) if value != 1
        }
        self._where[0] = [Unit(0, unit) for unit in range(dim)]
        self._scaled_inputs, self._scaled_outputs = in_binary(program)
        for k in program.instructions:
            if k.kind == "linear":
                self._linear(k)
            elif k.kind in GROUPED:
                self._grouped(k)
            else:
                self._elements(k)
        result = self.spread(self._read(program.result, 0, dim, width), dim, width)
        self.result = self.clean(result, zero=True)
        self.widest = max(sum(block.width for block in blocks) for blocks in self._layout)

    def _unit_of(self, value: int, unit: int) -> Unit:
        if value == 1:
            width = blocks_of(self.program.widths[1])[1]
            first = unit // width * width
            size = min(width, self.program.widths[1] - first)
            return Unit(self.emit(("given", first, size, width), width, size, ZERO), unit - first)
        found = self._where[value][unit]
        assert found is not None, "a unit is read before it is written"
        return found

    def _units(self, part: Any, first: int, count: int) -> list[Unit]:
        return [self._unit_of(part.value, part.first + (first + i) * part.step) for i in range(count)]

    def _read(self, part: Any, first: int, count: int, width: int) -> int:
        """Returns a register with units ``first`` to ``first + count - 1`` of a part, as a block or a column; or, if
        all of them are the same, a column for a block.
        """
        if part.value == 1 and part.step and width > 1:
            return self.emit(("given", part.first + first, count, width), width, count, ZERO)
        return self.gathered(self._units(part, first, count), width)

    def _write(self, value: int, first: int, register: int, count: int) -> None:
        self._where[value][first : first + count] = [Unit(register, unit) for unit in range(count)]

    def _pieces(self, k: Any) -> Iterator[tuple[int, Block]]:
        """Yields the blocks that an instruction writes: the first of its units, and a block of the value; or, if it
        writes a part of a block, a block of that part.
        """
        for block in self._layout[k.out]:
            first, end = max(block.first, k.first), min(block.first + block.count, k.first + k.width)
            if first >= end:
                continue
            if end - first < block.count:
                width = 1 if end - first == 1 and k.kind != "linear" else blocks_of(end - first)[1]
                block = Block(first, end - first, width)
            yield first - k.first, block

    def _operand(self, b: Any, first: int, count: int, width: int) -> tuple[str, int, int]:
        if not hasattr(b, "value"):
            return self.vector(b, first, count, width)
        register = self._read(b, first, count, width)
        return "register", register, self.widths[register]

    # Instructions ----------------------------------------------------------------------------------------------------

    def _elements(self, k: Any) -> None:
        found = []
        for first, block in self._pieces(k):
            if k.kind == "Identity":  # also of units that are nowhere side by side
                units = self._units(k.a, first, block.count)
                found.append((block, units))
                continue
            register = self.spread(self._computed(k, first, block.count, block.width), block.count, block.width)
            found.append((block, [Unit(register, unit) for unit in range(block.count)]))
        for block, units in found:
            self._where[k.out][block.first : block.first + block.count] = units

    def _computed(self, k: Any, first: int, count: int, width: int) -> int:
        if k.kind == "fill":
            return self.emit(("fill", width, self._operand(k.b, first, count, width)), width, count, ZERO)
        a = self._read(k.a, first, count, width)
        if k.kind not in BINARY:
            return self._unary(k, a)
        b = self._operand(k.b, first, count, width)
        width = max(self.widths[a], b[2])
        paddings = [self.padding[a], self.padding[b[1]] if b[0] == "register" else ZERO]
        padding = max(paddings)
        if k.kind == "divide" or min(self.widths[a], b[2]) < width:
            padding = ANY  # of a column every number counts
        return self.emit(("binary", k.kind, a, b), width, min(count, width), padding)

    def _unary(self, k: Any, a: int) -> int:
        if k.kind not in BINARY_LOGARITHM:
            p, q = (*(k.parameters or (_DEFAULTS.get(k.kind, 0.0),)), 0.0)[:2]
            return self._function(k.kind, a, p, q)
        if k.a.value not in self._scaled_outputs:
            a = self._function("affine", a, LOG2_E, 0.0)
        a = self._function(k.kind, a)
        return a if k.out in self._scaled_inputs else self._function("affine", a, LN_2, 0.0)

    def _function(self, name: str, a: int, p: float = 0.0, q: float = 0.0) -> int:
        known = self.padding[a]
        bad = name in (_UNBOUNDED_AT_ZERO if known == ZERO else _UNBOUNDED)
        padding = ANY if known == ANY or bad else FINITE
        return self.emit(("unary", name, a, p, q), self.widths[a], self.counts[a], padding)

    def _grouped(self, k: Any) -> None:
        size = k.a.width // k.groups
        means = []
        if k.kind != "rms_norm":
            means = [self._mean(self._units(k.a, g * size, size), size) for g in range(k.groups)]
        if k.kind == "mean":
            for g, register in enumerate(means):
                self._write(k.out, k.first + g, register, 1)
            return
        pieces = list(self._pieces(k))
        off = [
            self.spread(self._read(k.a, first, block.count, block.width), block.count, block.width)
            for first, block in pieces
        ]
        if means:
            off = [
                self._with_groups("subtract", each, means, size, *piece)
                for each, piece in zip(off, pieces, strict=True)
            ]
        units = [Unit(each, unit) for each, (_, block) in zip(off, pieces, strict=True) for unit in range(block.count)]
        scales = []
        for g in range(k.groups):
            square = self._mean(units[g * size : (g + 1) * size], size, squared=True)
            square = self._function("affine", square, 1.0, k.parameters[0])
            scales.append(self._function("rsqrt", square))
        for each, (first, block) in zip(off, pieces, strict=True):
            register = self._with_groups("multiply", each, scales, size, first, block)
            self._write(k.out, block.first, register, block.count)

    def _mean(self, units: Sequence[Unit], size: int, squared: bool = False) -> int:
        spans: list[list[int]] = []
        for register, unit in units:
            if spans and spans[-1][0] == register and spans[-1][2] == unit:
                spans[-1][2] += 1
            else:
                spans.append([register, unit, unit + 1])
        return self.emit(("mean", 1 / size, squared, tuple(map(tuple, spans))), 1, 1, ZERO)

    def _with_groups(self, name: str, a: int, columns: Sequence[int], size: int, first: int, block: Block) -> int:
        """Returns a block combined with the number of each unit's group."""
        units = [Unit(columns[(first + i) // size], 0) for i in range(block.count)]
        b = self.gathered(units, block.width) if len(set(units)) > 1 else units[0].register
        return self.emit(("binary", name, a, ("register", b, self.widths[b])), block.width, block.count, ANY)

    def _linear(self, k: Any) -> None:
        factor = self._scaled_outputs.get(k.out, 1.0)
        inputs, place = self._inputs(k.a), self.source("matrix", k.weight, k.width * k.a.width)
        found = []
        for first, block in self._pieces(k):
            width = max(block.width, 16)
            start = None
            if k.b is not None and hasattr(k.b, "value"):
                register = self.spread(self._read(k.b, first, block.count, width), block.count, width)
                start = ("register", self.clean(register, zero=True), width)
            elif k.b is not None:
                start = self.vector(k.b, first, block.count, width, factor)
            products = []
            for register, places, columns in inputs:
                of = self.widths[register]
                elements = torch.zeros((width, of), dtype=torch.int64, device="cpu")
                lines = place + (first + torch.arange(block.count, device="cpu"))[:, None] * k.a.width
                elements[: block.count, torch.tensor(places, device="cpu")] = lines + torch.tensor(
                    columns, device="cpu"
                )
                scale = factor * self._scaled_inputs.get(k.a.value, 1.0)
                self.blocks.append((self.weights.add(elements, scale), of, width))
                products.append((register, len(self.blocks) - 1))
            found.append((block, self.emit(("linear", width, start, tuple(products)), width, block.count, ZERO)))
        for block, register in found:
            self._write(k.out, block.first, register, block.count)

    def _inputs(self, part: Any) -> list[tuple[int, list[int], list[int]]]:
        """Returns the registers that a product reads, with the units that it reads, and which inputs these are."""
        units = self._units(part, 0, part.width)
        if len(set(units)) < len(units):  # a unit twice: their weights are not added up
            width = blocks_of(part.width)[1]
            units = []
            for first in range(0, part.width, width):
                size = min(width, part.width - first)
                register = self.spread(self._read(part, first, size, width), size, width)
                units += [Unit(register, unit) for unit in range(size)]
        found: dict[int, tuple[list[int], list[int]]] = {}
        for column, (register, unit) in enumerate(units):
            register = self.spread(register, 1, 16) if self.widths[register] == 1 else self.clean(register)
            places, columns = found.setdefault(register, ([], []))
            places.append(unit)
            columns.append(column)
        return [(register, *of) for register, of in found.items()]
