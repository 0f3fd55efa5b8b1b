"""A program becomes one that also computes the divergence of its result with respect to x.

Derivatives in forward mode are instructions like the others: the tangent of a linear layer is the layer without its
bias, that of an elementwise function is a product with its derivative. They are written once for each direction e, and
e^T (df/dx) e is summed up: over the unit vectors, or averaged over probes (Hutchinson 1990). They are derivatives of
what the program computes: ``detach`` in a network does not stop them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .derivatives import SLOPES, Units, Writer, factors_of_norm, tangent_of_norm
from .program import GROUPED, Instruction, Part, Program, Vector, Vectors

__all__ = ["WithDivergence", "with_divergence"]


@dataclass(frozen=True)
class WithDivergence:
    """A program of d + 1 units in and out: x and one more in, an output and its divergence out.

    Args:
        program: it returns f and div f; or, with rates r and s that follow the row, r x + s f and s div f.
        dim: d.
        probes: how many; 0 for the exact trace.
        has_rates: whether r and s are among the numbers of a row.
        constants, matrices: numbers that it has besides the original program's.
    """

    program: Program
    dim: int
    probes: int
    has_rates: bool
    constants: tuple[Tensor, ...]
    matrices: tuple[Tensor, ...]

    def vectors(self, of: Vectors, signs: Tensor | None, rates: tuple[Tensor, Tensor] | None = None) -> Vectors:
        """Returns the numbers that it reads.

        Args:
            of: those of the original program.
            signs: the probes ``[probes, B, *shape]``, or None.
            rates: r and s ``[K]``, if it has them.
        """
        given, rows = of.given, of.rows
        if signs is not None:
            zero = signs.new_zeros((*signs.shape[:2], 1))
            probes = torch.cat((signs.flatten(2), zero), 2).transpose(0, 1).reshape(len(given), -1)
            given = torch.cat((given, probes.to(given.dtype)), 1)
        if rates is not None:
            r, s = (each.to(rows)[:, None] for each in rates)
            rows = torch.cat((rows, r.expand(-1, self.dim), s.expand(-1, self.dim + 1)), 1)
        return Vectors([*of.matrices, *self.matrices], [*of.constants, *self.constants], rows, given)


def with_divergence(
    program: Program, dim: int, probes: int, has_rates: bool, constants: int, matrices: int
) -> WithDivergence:
    """Returns a program with the divergence of its result.

    Args:
        program: its value 0 is x, d units, followed by t if each sample has a time of its own.
        dim: d.
        probes: how many probes the divergence is averaged over; 0 for the exact trace.
        has_rates: whether the result is a velocity r x + s f, with its divergence except for r d.
        constants, matrices: how many the program has.
    """
    writing = _Derivation(program, dim, probes, constants, matrices)
    trace = writing.trace()
    writer, f = writing.writer, program.result
    result = Part(writer.new(dim + 1), 0, dim + 1)
    first, last = Part(result.value, 0, dim), Part(result.value, dim, 1)
    row_width = program.row_width
    if has_rates:
        r = Vector(row_width, dim, True)
        s, s_last = Vector(row_width + dim, dim, True), Vector(row_width + 2 * dim, 1, True)
        x = writer.emit("multiply", Part(0, 0, dim), r)
        writer.emit("add", x, writer.emit("multiply", f, s), out=first)
        writer.emit("multiply", trace, s_last, out=last)
        row_width += 2 * dim + 1
    else:
        writer.emit("Identity", f, out=first)
        writer.emit("Identity", trace, out=last)
    made = writer.finished(result, row_width)
    return WithDivergence(made, dim, probes, has_rates, tuple(writing.constants), tuple(writing.matrices))


class _Derivation:
    """Writes a program's instructions, and their tangents for one direction after the other."""

    def __init__(self, program: Program, dim: int, probes: int, constants: int, matrices: int) -> None:
        widths = list(program.widths)
        widths[0], self._given = dim + 1, widths[1]
        widths[1] += probes * (dim + 1)
        self._program, self._dim, self._probes = program, dim, probes
        self.constants, self.matrices = list[Tensor](), list[Tensor]()
        self._first_constant, self._first_matrix = constants, matrices
        self.writer = Writer(widths)
        self._varies = [torch.zeros(width, dtype=torch.bool, device="cpu") for width in widths]
        self._varies[0][:dim] = True
        self._slopes = dict[int, Units | float]()
        self._tangents = dict[int, tuple[int, int]]()  # of a value: its value, and its first unit
        for number, k in enumerate(program.instructions):
            self.writer.instructions.append(k)
            if self._follows_x(k.a) or self._follows_x(k.b):
                self._varies[k.out][k.first : k.first + k.width] = True
            if self._follows_x(k.a) and k.a is not None:
                self._add_slope(number, k, self._units(k.a))

    def trace(self) -> Part:
        """Writes the sum of e^T (df/dx) e and returns it."""
        f, out = self._program.result, Part(self.writer.new(1), 0, 1)
        self.writer.emit("fill", None, self._constant(_zeros(1)), out=out)
        for i in range(self._probes or self._dim):
            self._tangents = {0: self._direction(i)}
            for number, k in enumerate(self._program.instructions):
                if bool(self._varies[k.out].any()):
                    self._add_tangent(number, k)
            tangent = self._tangent(Part(f.value, f.first, self._dim))
            if tangent is None:
                continue
            if self._probes:
                signs = Part(1, self._tangents[0][1], self._dim)
                tangent, weight = self.writer.emit("multiply", tangent, signs), _zeros(self._dim) + 1 / self._probes
            else:
                weight = _unit(i, self._dim)
            self.writer.emit("linear", tangent, out, out=out, weight=self._matrix(weight[None]))
        return out

    def _direction(self, i: int) -> tuple[int, int]:
        """Returns where direction i is, in as many units as value 0 has."""
        if self._probes:
            return 1, self._given + i * (self._dim + 1)
        unit = self._constant(_unit(i, self._dim + 1))
        return self.writer.emit("fill", None, unit).value, 0

    def _constant(self, numbers: Tensor) -> Vector:
        self.constants.append(numbers)
        return Vector(self._first_constant + len(self.constants) - 1, len(numbers), False)

    def _matrix(self, numbers: Tensor) -> int:
        self.matrices.append(numbers)
        return self._first_matrix + len(self.matrices) - 1

    def _units(self, part: Part) -> Units:
        return Units(self.writer, part)

    def _follows_x(self, operand: Part | Vector | None) -> bool:
        if not isinstance(operand, Part):
            return False
        width = operand.width if operand.step else 1
        return bool(self._varies[operand.value][operand.first : operand.first + width].any())

    def _tangent(self, operand: Part | Vector | None) -> Part | None:
        """Returns the tangent of an operand, or None if it is zero."""
        if not isinstance(operand, Part) or not self._follows_x(operand):
            return None
        value, first = self._tangents[operand.value]
        return Part(value, first + operand.first, operand.width, operand.step)

    def _add_slope(self, number: int, k: Instruction, a: Units) -> None:
        """Writes what the tangents of an instruction have in common."""
        out = self._units(Part(k.out, k.first, k.width))
        if k.kind in SLOPES:
            self._slopes[number] = SLOPES[k.kind](a, out, k.parameters)
        elif k.kind in GROUPED and k.kind != "mean":
            self._slopes[number] = factors_of_norm(k, a)

    def _add_tangent(self, number: int, k: Instruction) -> None:
        if k.out not in self._tangents:
            self._tangents[k.out] = self.writer.new(self.writer.widths[k.out]), 0
        out = Part(self._tangents[k.out][0], k.first, k.width)
        da, db = self._tangent(k.a), self._tangent(k.b)
        if da is None and db is None:
            if k.kind != "linear" or not isinstance(k.b, Part) or k.b.value != k.out:
                self.writer.emit("fill", None, self._constant(_zeros(k.width)), out=out)
        elif k.kind == "linear":
            self._linear(k, da, db, out)
        elif k.kind == "mean":
            self.writer.emit("mean", da, out=out, groups=k.groups)
        elif k.kind in GROUPED:
            assert da is not None
            factors, result = self._slopes[number], self._units(Part(k.out, k.first, k.width))
            assert isinstance(factors, Units)
            tangent_of_norm(k, factors, result, self._units(da), out)
        elif k.kind in SLOPES:
            assert da is not None
            self._scaled(da, self._slopes[number], out)
        else:
            self._of_two(k, da, db, out)

    def _linear(self, k: Instruction, da: Part | None, db: Part | None, out: Part) -> None:
        if da is not None:
            self.writer.emit("linear", da, db, out=out, weight=k.weight)
        elif db is not None and db != out:
            self.writer.emit("Identity", db, out=out)

    def _scaled(self, da: Part, slope: Units | float, out: Part) -> None:
        if isinstance(slope, Units):
            self.writer.emit("multiply", da, slope.part, out=out)
        elif slope == 1:
            self.writer.emit("Identity", da, out=out)
        else:
            self.writer.emit("affine", da, None, (slope, 0.0), out=out)

    def _of_two(self, k: Instruction, da: Part | None, db: Part | None, out: Part) -> None:
        """Writes the tangent of a sum, a difference, a product or a quotient."""
        writer, a, b = self.writer, k.a, k.b
        assert a is not None
        assert b is not None
        if k.kind == "multiply":
            da = None if da is None else writer.emit("multiply", da, b)
            db = None if db is None else writer.emit("multiply", db, a)
        elif k.kind == "divide":  # (da - out db) / b
            da = None if da is None else writer.emit("divide", da, b)
            if db is not None:
                db = writer.emit("divide", writer.emit("multiply", db, Part(k.out, k.first, k.width)), b)
        minus = k.kind in ("subtract", "divide")
        if da is not None and db is not None:
            writer.emit("subtract" if minus else "add", da, db, out=out)
        elif da is not None:
            writer.emit("Identity", da, out=out)
        elif db is not None:
            self._scaled(db, -1.0 if minus else 1.0, out)


def _zeros(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float32, device="cpu")


def _unit(i: int, width: int) -> Tensor:
    vector = _zeros(width)
    vector[i] = 1
    return vector
