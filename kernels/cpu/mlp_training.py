"""Training steps of a small network: forward, backward, Adam and the moving average, dozens of steps per call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import call, has_code
from .program import codes_of, is_part, parameters_of, parts_of, unknown_instruction

_LANES = 16  # the places of values in a row are multiples of this
_NO_OPERAND, _UNITS, _CONSTANT = range(3)  # the kinds of a second operand
_NOTHING, _WRITES, _ADDS = range(3)  # how the gradient of an operand is given
_FORGET = {"linear", "add", "subtract", "multiply", "affine"}  # whose derivatives do not need the result


class _Trained(ctypes.Structure):
    """``Trained`` in backward.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("operation", "activation", "out", "width")),
        *((name, ctypes.c_int64) for name in ("a", "a_step", "a_width", "a_is_whole", "a_gradient")),
        *((name, ctypes.c_int64) for name in ("b_kind", "b", "b_step", "b_gradient")),
        *((name, ctypes.c_int64) for name in ("matrix", "vector", "slope", "groups", "needs_gradient")),
        ("parameters", ctypes.c_float * 2),
    )


class _Item(ctypes.Structure):
    """``Item`` in trained.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride", "is_vector", "trains")
    )


class Parameters(NamedTuple):
    """Tensors of the items of a program, its matrices and then its constants, each fp32 with the same strides in all.

    ``average`` and ``square`` are Adam's averages of the gradient and of its square, and ``moving`` is the moving
    average of the weights, if there is one. They are None for items without a gradient.
    """

    weights: Sequence[Tensor]
    average: Sequence[Tensor | None]
    square: Sequence[Tensor | None]
    moving: Sequence[Tensor | None] | None


class Packed:
    """A program in training as the kernel reads it.

    Args:
        program: a `fastsde.lowering.Program` whose last input is the time.
        trains: whether each item has a gradient: the matrices, in order, and then the constants.
        matrices: how many of the items are matrices.

    Raises:
        ValueError: for an instruction that the kernel does not have, or a vector that trains and is read twice.
    """

    def __init__(self, program: Any, trains: Sequence[bool], matrices: int) -> None:
        unknown = unknown_instruction(program.names)
        if unknown is not None:
            raise ValueError(f"the native kernel has no instruction {unknown!r}")
        self.program, self.trains, self.matrices = program, tuple(trains), matrices
        self.places, self.row = [], 0
        in_place = _in_place(program)
        for value, width in enumerate(program.widths):
            self.places.append(self.places[in_place[value]] if value in in_place else self.row)
            self.row += 0 if value in in_place else -(-width // _LANES) * _LANES
        self.slopes = 0
        self._code = (_Trained * max(1, len(program.instructions)))()
        needs = self._needs()
        self.zeros = self._give(needs)
        for number, k in enumerate(program.instructions):
            self._write(self._code[number], k, needs[k.out])

    def _needs(self) -> list[bool]:
        """Returns which values have a gradient: those that follow from a parameter."""
        needs = [False] * len(self.program.widths)
        read: set[int] = set()
        for k in self.program.instructions:
            own = k.kind == "linear" and self.trains[k.weight]
            if k.b is not None and not is_part(k.b):
                vector = self.matrices + k.b.number
                if self.trains[vector]:
                    if vector in read:
                        raise ValueError("a parameter is used twice")
                    read.add(vector)
                    own = True
            needs[k.out] |= own or any(needs[part.value] for part in parts_of(k))
        return needs

    def _give(self, needs: Sequence[bool]) -> list[tuple[int, int]]:
        """Sets how each operand's gradient is given, and returns the runs of a row that start as zeros.

        The last reader of a whole value writes its gradient; if it reads a part, the gradient starts as zeros.
        """
        zeros = []
        widths, result = self.program.widths, self.program.result
        seen = {result.value}
        if (result.first, result.width) != (0, widths[result.value]):
            zeros.append((self.places[result.value], widths[result.value]))
        for number in reversed(range(len(self.program.instructions))):
            k, to = self.program.instructions[number], self._code[number]
            for name, part in (("a_gradient", k.a), ("b_gradient", k.b)):
                if not is_part(part) or not needs[part.value] or part.value == k.out:
                    continue
                is_whole = part.step == 1 and (part.first, part.width) == (0, widths[part.value])
                setattr(to, name, _WRITES if is_whole and part.value not in seen else _ADDS)
                if not is_whole and part.value not in seen:
                    zeros.append((self.places[part.value], widths[part.value]))
                seen.add(part.value)
        unread = [v for v, need in enumerate(needs) if need and v not in seen]
        return zeros + [(self.places[v], widths[v]) for v in unread]

    def _write(self, to: _Trained, k: Any, needs_gradient: bool) -> None:
        to.operation, to.activation = codes_of(k)
        to.out, to.width, to.groups = self.places[k.out] + k.first, k.width, k.groups
        to.matrix, to.vector, to.needs_gradient = k.weight, -1, needs_gradient
        if k.a is not None:
            to.a, to.a_step, to.a_width = self.places[k.a.value] + k.a.first, k.a.step, k.a.width
            to.a_is_whole = (k.a.first, k.a.width) == (0, self.program.widths[k.a.value])
        if is_part(k.b):
            to.b_kind, to.b, to.b_step = _UNITS, self.places[k.b.value] + k.b.first, k.b.step
        elif k.b is not None:
            to.b_kind, to.vector = _CONSTANT, self.matrices + k.b.number
        if not has_code("operation", k.kind):
            to.slope = self.slopes
            self.slopes += -(-k.width // _LANES) * _LANES
        for i, value in enumerate(parameters_of(k)):
            to.parameters[i] = value

    def items(self, weights: Sequence[Tensor]) -> Any:
        """Returns the items as the kernel takes them."""
        made = (_Item * max(1, len(weights)))()
        for number, (to, weight) in enumerate(zip(made, weights, strict=False)):
            is_vector = number >= self.matrices
            view = weight[None] if is_vector else weight
            to.rows, to.columns = view.shape
            to.row_stride, to.column_stride = view.stride()
            to.is_vector, to.trains = is_vector, self.trains[number]
        return made


def _in_place(program: Any) -> dict[int, int]:
    """Returns the activations' results that take the place of their operands, which nothing else reads.

    The derivative of an activation is kept; that of the operand must not need it.
    """
    readers = [part.value for k in program.instructions for part in parts_of(k) if part.value != k.out]
    readers.append(program.result.value)
    makers: dict[int, set[str]] = {}
    for k in program.instructions:
        makers.setdefault(k.out, set()).add(k.kind)
    found = {}
    for k in program.instructions:
        if has_code("operation", k.kind) or k.a.value < 2 or not k.a.step:
            continue
        width = program.widths[k.out]
        is_whole = (k.first, k.width, k.a.first, k.a.width, program.widths[k.a.value]) == (0, width, 0, width, width)
        if is_whole and readers.count(k.a.value) == 1 and makers[k.a.value] <= _FORGET:
            found[k.out] = k.a.value
    return found


def _pointers(tensors: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Any:
    """Returns pointers to tensors, which have the strides of the weights."""
    for each, weight in zip(tensors, weights, strict=True):
        if each is not None and (each.dtype, each.device.type, each.stride()) != (
            torch.float32,
            "cpu",
            weight.stride(),
        ):
            raise TypeError(f"parameters must be fp32 on the CPU with equal strides, got {each.dtype} on {each.device}")
    return (ctypes.c_void_p * max(1, len(tensors)))(*(None if each is None else each.data_ptr() for each in tensors))


def mlp_training(
    parameters: Parameters,
    packed: Packed,
    x_0: Tensor,
    keys: Tensor,
    table: Tensor,
    *,
    scale: float,
    shift: float,
    betas: tuple[float, float],
    epsilon: float,
    first: int,
    taken: int,
    rates: Tensor,
) -> Tensor:
    """Takes steps in place and returns their losses, fp32 ``[count]``.

    Args:
        x_0: the data, contiguous uint8 or fp32 ``[N, d]``, N at least 1.
        keys: int64 ``[B, 2]``, the keys of the positions in the batch.
        table: the coefficients of the steps, contiguous fp32 ``[count, B, 6]``.
        betas, epsilon: Adam's.
        first: the number of the first step; the random numbers of a step depend on its number.
        taken: how many steps Adam has taken before.
        rates: contiguous fp32 ``[count, 2]``, the learning rate and 1 - the decay of the moving average of each step.
    """
    program, weights = packed.program, parameters.weights
    losses = torch.empty_like(rates[:, 0])
    zeros = torch.tensor(packed.zeros, dtype=torch.int64, device="cpu").reshape(-1, 2)
    result = packed.places[program.result.value] + program.result.first
    call(
        "mlp_training",
        packed._code,
        len(program.instructions),
        packed.row,
        packed.slopes,
        x_0[0].numel(),
        result,
        zeros,
        len(zeros),
        packed.items(weights),
        len(weights),
        *(None if each is None else _pointers(each, weights) for each in parameters),
        x_0,
        x_0.dtype == torch.uint8,
        len(x_0),
        scale,
        shift,
        keys,
        len(keys),
        table,
        *betas,
        epsilon,
        first,
        len(rates),
        taken,
        rates,
        losses,
    )
    return losses
