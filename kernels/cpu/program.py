"""The program of a network (`fastsde.lowering.program`) as the kernel ``mlp_sampler`` reads it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import address, code, has_code

GROUPED = ("mean", "layer_norm", "rms_norm")
_NO_OPERAND, _UNITS, _CONSTANT, _OF_ROW = range(4)  # the kinds of a second operand
_SPECIALS = 32  # an activation, or a normal, takes as long as so many multiply-adds
_USUAL = {"LeakyReLU": 0.01, "ELU": 1.0}  # PyTorch's defaults of an activation's parameter


def parts_of(k: Any) -> list[Any]:
    """Returns the operands of an instruction that are parts of values."""
    return [each for each in (k.a, k.b) if is_part(each)]


def is_part(operand: Any) -> bool:
    """Returns whether an operand is a part of a value, not a vector."""
    return hasattr(operand, "value")


def codes_of(k: Any) -> tuple[int, int]:
    """Returns the kernel's numbers for an instruction: of the operation, and of the activation if it is one."""
    if has_code("operation", k.kind):
        return code("operation", k.kind), 0
    return code("operation", "activation"), code("activation", k.kind)


def parameters_of(k: Any) -> tuple[float, ...]:
    """Returns an instruction's parameters."""
    return k.parameters or (_USUAL.get(k.kind, 0.0),)


class _Instruction(ctypes.Structure):
    """``Instruction`` in program.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("operation", "activation", "out", "a", "a_step", "width")),
        *((name, ctypes.c_int64) for name in ("b_kind", "b", "b_step")),
        ("constant", ctypes.c_void_p),
        ("depth", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("w_row", "w_column", "starts_stage", "feeds_linear")),
        ("parameters", ctypes.c_float * 2),
    )


def unknown_instruction(names: Sequence[str]) -> str | None:
    """Returns the first of the names of instructions that the kernel does not have, or None."""
    return next((name for name in names if not (has_code("operation", name) or has_code("activation", name))), None)


class Packed:
    """A program with a place in memory for each of its values.

    Args:
        program: a `fastsde.lowering.Program`.

    Raises:
        ValueError: for an instruction that the kernel does not have.
    """

    def __init__(self, program: Any) -> None:
        self.program, self.dim = program, program.dim
        self.stages = _stages(program)
        self.units, places = _allocated(program, self.stages)
        self._code = (_Instruction * max(1, len(program.instructions)))()
        read = {k.a.value for k in program.instructions if k.kind == "linear"}
        for number, k in enumerate(program.instructions):
            self._write(self._code[number], k, places, self.stages[number], k.out in read)
        self.result = places[program.result.value] + program.result.first
        # Multiply-adds per sample and row.
        self.products = program.products + _SPECIALS * (program.dim + sum(k.width for k in program.instructions))
        self._known: Any = None

    @staticmethod
    def _write(to: _Instruction, k: Any, places: Sequence[int], stage: int, feeds_linear: bool) -> None:
        if unknown_instruction([k.kind]) is not None:
            raise ValueError(f"the native kernel has no instruction {k.kind!r}")
        to.operation, to.activation = codes_of(k)
        to.out, to.width, to.depth = places[k.out] + k.first, k.width, 1
        if k.a is not None:
            to.a, to.a_step = places[k.a.value] + k.a.first, k.a.step
            to.depth = k.a.width if k.kind == "linear" else k.a.width // k.groups
        if k.kind == "mean":
            to.width = k.a.width
        if is_part(k.b):
            to.b_kind, to.b, to.b_step = _UNITS, places[k.b.value] + k.b.first, k.b.step
        elif k.b is not None:
            to.b_kind, to.b = (_OF_ROW, k.b.number) if k.b.is_row else (_CONSTANT, 0)
        to.starts_stage, to.feeds_linear = stage, feeds_linear
        for i, value in enumerate(parameters_of(k)):
            to.parameters[i] = value

    def arguments(self, vectors: Any) -> tuple[tuple[Any, ...], Any]:
        """Returns the program as the kernel takes it, as pointers, and the tensors that they point to."""
        constants = [each.contiguous() for each in vectors.constants]
        matrices = list(vectors.matrices)
        key = [each.data_ptr() for each in (*constants, *matrices)], [each.stride() for each in matrices]
        if self._known != key:
            for to, k in zip(self._code, self.program.instructions, strict=False):
                if k.kind == "linear":
                    matrix: Tensor = matrices[k.weight]
                    if not matrix.is_cpu or matrix.dtype != torch.float32:
                        raise TypeError(
                            f"weights must be torch.float32 on the CPU, got {matrix.dtype} on {matrix.device}"
                        )
                    to.weights, (to.w_row, to.w_column) = matrix.data_ptr(), matrix.stride()
                if to.b_kind == _CONSTANT:
                    to.constant = address(constants[k.b.number], torch.float32)
            self._known = key
        program = self.program
        sizes = len(program.instructions), self.units, program.widths[1], program.dim, self.result
        return (self._code, *sizes), (constants, matrices)


def _stages(program: Any) -> list[int]:
    """Returns of each instruction whether it starts a stage: an instruction belongs to the stage before it if its row i
    needs nothing of that stage but row i.
    """
    starts, width, written = [], -1, {}
    for k in program.instructions:
        parts = [each for each in parts_of(k) if each.value in written]
        aligned = all(part.step == 1 and part.first == written[part.value] for part in parts)
        if k.kind == "linear":
            aligned = aligned and k.a.value not in written
        joins = k.width == width and aligned and k.kind not in GROUPED and written.get(k.out, k.first) == k.first
        if not joins:
            width, written = (-1 if k.kind in GROUPED else k.width), {}
        written[k.out] = k.first
        starts.append(int(not joins))
    return starts


def _allocated(program: Any, starts: Sequence[int]) -> tuple[int, list[int]]:
    """Returns how many units the memory of a block has, and the place of each value in it.

    Values that are no longer read make room for others, but not before the end of the stage that reads them last: other
    rows of that stage may still be to come. An elementwise instruction works in place where no other instruction of its
    stage reads other rows.
    """
    stage_of: list[int] = []
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    scattered: dict[int, int] = {}  # the last stage that reads a value's rows in another order
    for number, k in enumerate(program.instructions):
        stage_of.append((stage_of[-1] if stage_of else -1) + starts[number])
        first.setdefault(k.out, number)
        for part in parts_of(k):
            last[part.value] = number
            if k.kind == "linear" or part.step != 1 or part.first != k.first:
                scattered[part.value] = stage_of[-1]
        last[k.out] = max(last.get(k.out, 0), number)
    last[program.result.value] = len(program.instructions)
    places = [0] * len(program.widths)
    places[1] = program.widths[0]
    base = end = program.widths[0] + program.widths[1]
    held: list[tuple[int, int, int]] = []  # (place, width, the stage up to which it is held)

    def stage_after(value: int) -> int:
        number = last[value]
        return stage_of[number] if number < len(stage_of) else len(stage_of) + 1

    for number, k in enumerate(program.instructions):
        if first[k.out] != number:
            continue
        width = program.widths[k.out]
        held = [each for each in held if each[2] >= stage_of[number]]
        a = k.a
        in_place = (
            (a is not None and a.value > 1 and a.step == 1 and a.first == 0)
            and k.kind not in ("linear", *GROUPED)
            and (a.width == k.width == width == program.widths[a.value] and last[a.value] == number)
            and scattered.get(a.value, -1) < stage_of[number]
        )
        if in_place:
            places[k.out] = places[a.value]
            held = [each for each in held if each[0] != places[a.value]]
        else:
            at = base
            for place, size, _ in sorted(held):
                if at + width <= place:
                    break
                at = max(at, place + size)
            places[k.out] = at
        held.append((places[k.out], width, stage_after(k.out)))
        end = max(end, places[k.out] + width)
    return end, places
