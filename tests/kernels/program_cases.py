"""Programs made by hand, and the Triton kernel's results for them beside plain PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsde import StepTable, noise, ops
from fastsde.lowering import Instruction, Part, Program, Vector, Vectors, evaluate

__all__ = ["ROUNDING", "Maker", "check"]

Made = tuple[Program, Vectors]
ROUNDING = {"fp32": 2**-20, "tf32": 2**-9, "bf16": 2**-6}  # of a few products and functions, for results of order 1


class Maker:
    """Makes a program, instruction by instruction, and its numbers.

    Args:
        dim: the elements of a sample.
        given: the numbers per sample.
    """

    def __init__(self, dim: int, given: int = 0) -> None:
        self.widths, self.row_width = [dim, given], 0
        self.instructions: list[Instruction] = []
        self.matrices: list[Tensor] = []
        self.constants: list[Tensor] = []

    def new(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def whole(self, value: int) -> Part:
        return Part(value, 0, self.widths[value])

    def vector(self, width: int, is_row: bool) -> Vector:
        if is_row:
            self.row_width += width
            return Vector(self.row_width - width, width, True)
        self.constants.append(torch.randn(width))
        return Vector(len(self.constants) - 1, width, False)

    def add(self, kind: str, a: Part | None, b: Any = None, width: int | None = None, **options: Any) -> int:
        """Adds an instruction that writes to ``out``, by default a new value, and returns that."""
        width = (a or b).width if width is None else width
        if kind == "linear":
            assert a is not None
            options["weight"] = len(self.matrices)
            self.matrices.append(torch.randn(width, a.width) / a.width**0.5)
        out = options.pop("out", None)
        out = self.new(width) if out is None else out
        self.instructions.append(Instruction(kind, out, width, a, b, **options))
        return out

    def linear(self, a: int, width: int, is_row: bool = False) -> int:
        return self.add("linear", self.whole(a), self.vector(width, is_row), width)

    def finished(self, value: int, n: int) -> Made:
        """Returns the program with a product of a value as its result."""
        result = self.whole(self.linear(value, self.widths[0]))
        program = Program(tuple(self.widths), tuple(self.instructions), result, self.row_width)
        rows = torch.randn(2, self.row_width)
        return program, Vectors(self.matrices, self.constants, rows, torch.randn(n, self.widths[1]))


def _table() -> StepTable:
    """Returns a table whose rows set the state to the network's output."""
    zeros = {name: torch.zeros(2, 1, dtype=torch.float64) for name in "pbedn"}
    zeros["n"], zeros["b"] = zeros["n"] + 1, zeros["b"] + 1
    none = torch.zeros(2, 1, 1, dtype=torch.float64)
    return StepTable(torch.ones(2, dtype=torch.float64), A=none, q=none[:, 0, 0], **zeros)


def check(made: Made, n: int, device: torch.device, precision: str = "fp32") -> None:
    """Compares both rows of a program with plain PyTorch."""
    program, vectors = made
    x = torch.randn(n, program.dim)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    packed = ops.pack_program(program, device, dtype)
    tensors = [[each.to(device) for each in group] for group in (vectors.matrices, vectors.constants)]
    there = Vectors(*tensors, vectors.rows.to(device), vectors.given.to(device))
    options = {"x_init": x.to(device), "precision": precision}
    keys = noise.sample_keys(0, n, device=device)
    ours = ops.launch_mlp_sampler(packed, _table(), keys, vectors=there, **options).cpu()
    doubled = Vectors(
        *([e.double() for e in g] for g in (vectors.matrices, vectors.constants)), vectors.rows, vectors.given
    )
    doubled.rows, doubled.given = doubled.rows.double(), doubled.given.double()
    middle = evaluate(program, doubled, x.double(), 0)
    theirs = evaluate(program, doubled, middle, 1)
    scale = max(1.0, float(middle.abs().max()), float(theirs.abs().max()))
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=50 * ROUNDING[precision] * scale)
