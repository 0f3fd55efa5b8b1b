"""Builds a program, instruction by instruction, while a recorded call is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .elements import Elements, Run, are_the_same, coded, numbers_of, of_samples, positions_of, samples_in
from .program import Instruction, Part, Program, Vector
from .recording import Needs, NotLowered, Operation, Recorder, Value

__all__ = ["Builder"]

_MOST_RUNS = 64  # that an operand is copied together from


class Builder:
    """The program so far, and the tensors that it reads.

    What is known ahead is computed by PyTorch under the recorder, so that it can be computed again.

    Args:
        recorder: of the network's call.
        inputs: the units of value 0.
    """

    def __init__(self, recorder: Recorder, inputs: int) -> None:
        self.recorder, self.batch = recorder, recorder.batch
        self.elements = Elements()
        self.widths = [inputs, 0]
        self.instructions: list[Instruction] = []
        self.matrices: list[Value] = []
        self.constants: list[Value] = []
        self.rows: list[Value] = []
        self.given: list[Value] = []
        self.row_width = 0
        self.at: Operation | None = None  # the operation that is read
        self._codes: dict[int, Tensor] = {}
        self._vectors: dict[Any, Vector] = {}
        self._given_at: dict[Value, int] = {}

    # Codes -----------------------------------------------------------------------------------------------------------

    def codes_of(self, value: Value) -> Tensor:
        """Returns the codes of a value."""
        if value.number in self._codes:
            return self._codes[value.number]
        needs = self.recorder.needs(value)
        if not needs.is_ahead:
            raise NotLowered("it reads a result that a program does not have")
        self.recorder.uses(self.at, value)
        shape = tuple(value.tensor.shape)
        is_given = needs == Needs.CONDITION and shape[:1] == (self.batch,)
        size = value.tensor.numel() // (self.batch if is_given else 1)
        return coded(self.elements.base(value, size), shape, 0 if is_given else None)

    def is_traced(self, value: Any) -> bool:
        """Returns whether a value follows the state."""
        return isinstance(value, Value) and value.number in self._codes

    def set(self, value: Value, codes: Tensor) -> None:
        """Says where the elements of a value come from."""
        if tuple(codes.shape) != tuple(value.tensor.shape):
            raise NotLowered("it has another shape than expected")
        self._codes[value.number] = codes

    def start(self, state: Value, time: Value | None = None) -> None:
        """Names the network's input x ``[batch, *shape]`` and, where it is an input too, t ``[batch]``."""
        base = self.elements.base(0, self.widths[0])
        self.set(state, coded(base, state.tensor.shape, 0))
        if time is not None:
            self.set(time, coded(base + self.widths[0] - 1, time.tensor.shape, 0))

    # Operands --------------------------------------------------------------------------------------------------------

    def per_sample(self, *operands: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the positions ``[batch, width]`` of the samples in a shape, and there the numbers of each operand's
        elements, ``[width]``.

        Raises:
            NotLowered: if samples are not treated alike.
        """
        positions = positions_of(samples_in(self.batch, *operands), self.batch)
        found = []
        for codes in operands:
            numbers = numbers_of(codes).reshape(-1)[positions]
            same = are_the_same(codes).reshape(-1)[positions]
            if not bool(((numbers == numbers[:1]) | same).all()):
                raise NotLowered("it treats samples differently")
            found.append(numbers[0])
        return positions, found

    def by_row(self, codes: Tensor) -> Tensor:
        """Returns the numbers ``[width]`` of the elements of codes ``[batch, width]``, where row i is sample i."""
        positions, (numbers,) = self.per_sample(codes)
        if not torch.equal(positions.reshape(-1), torch.arange(codes.numel(), device="cpu")):
            raise NotLowered("it mixes samples")
        return numbers

    def part(self, numbers: Tensor) -> Part:
        """Returns elements as a part of a value, copied together if they are not."""
        runs = self.elements.runs(numbers)
        run = runs[0] if len(runs) == 1 else None
        if run is not None and not self._is_ahead(run):
            return Part(*self._place(run), run.length, run.step)
        if len(runs) > _MOST_RUNS:
            raise NotLowered(f"it moves elements in more than {_MOST_RUNS} pieces")
        out = self.new(len(numbers))
        at = 0
        while runs:
            ahead = []
            while runs and self._is_ahead(runs[0]):
                ahead.append(runs.pop(0))
            if ahead:
                vector = self.vector(ahead)
                self.emit("fill", out, vector.width, b=vector, first=at)
                at += vector.width
            elif runs:
                run = runs.pop(0)
                self.emit("Identity", out, run.length, Part(*self._place(run), run.length, run.step), first=at)
                at += run.length
        return Part(out, 0, len(numbers))

    def run_of_units(self, codes: Tensor) -> Part:
        """Returns all elements of codes ``[batch, ...]`` as neighbouring units."""
        return self.units(self.by_row(codes.reshape(self.batch, -1)))

    def units(self, numbers: Tensor) -> Part:
        """Returns elements as neighbouring units: only elementwise instructions read one unit repeated."""
        part = self.part(numbers)
        return part if part.step else self.made("Identity", part)

    def operand(self, numbers: Tensor) -> Part | Vector:
        """Returns elements as a vector if all are the same for all samples, else as a part."""
        runs = self.elements.runs(numbers)
        return self.vector(runs) if all(map(self._is_ahead, runs)) else self.part(numbers)

    def are_ahead(self, numbers: Tensor) -> Tensor:
        """Returns which elements are the same for all samples, bool ``[width]``."""
        return torch.tensor(
            [self._is_ahead(run) for run in self.elements.runs(numbers) for _ in range(run.length)], device="cpu"
        )

    def _is_ahead(self, run: Run) -> bool:
        return isinstance(run.source, Value) and self.recorder.needs(run.source) in (Needs.NOTHING, Needs.TIME)

    def _place(self, run: Run) -> tuple[int, int]:
        """Returns the value of the program that a run is in, and its first unit."""
        if isinstance(run.source, int):
            return run.source, run.first
        if run.source not in self._given_at:
            self._given_at[run.source] = self.widths[1]
            self.widths[1] += run.source.tensor.numel() // self.batch
            self.given.append(run.source)
        return 1, self._given_at[run.source] + run.first

    def vector(self, runs: Sequence[Run]) -> Vector:
        """Returns numbers that are the same for all samples, gathered from tensors that are known ahead."""
        key = tuple((id(run.source), run.first, run.length, run.step) for run in runs)
        if key not in self._vectors:
            with self.recorder:
                # One run is looked at, not copied: its gradient is then that of the parameter.
                one = len(runs) == 1 and runs[0].step
                numbers = self.gathered(runs[0]) if one else torch.cat([self.gathered(run) for run in runs])
            self._vectors[key] = self.vector_of(numbers)
        return self._vectors[key]

    def gathered(self, run: Run) -> Tensor:
        """Returns a run of a tensor that is known ahead, computed under the recorder."""
        assert isinstance(run.source, Value)
        flat = run.source.tensor.reshape(-1)
        if run.step == 0:
            return flat[run.first : run.first + 1].expand(run.length)
        return flat[run.first : run.first + run.length]

    def gathered_conditions(self, run: Run) -> Tensor:
        """Returns a run of conditions, ``[batch, width]``, computed under the recorder."""
        assert isinstance(run.source, Value)
        flat = run.source.tensor.reshape(self.batch, -1)
        return flat[:, run.first : run.first + max(1, run.length * run.step)].expand(-1, run.length)

    def part_of_conditions(self, tensor: Tensor) -> Part:
        """Returns the part for a tensor ``[batch, width]`` that has been computed of conditions under the recorder."""
        base = self.elements.base(self.recorder.value_of(tensor), tensor.shape[1])
        return self.part(base + torch.arange(tensor.shape[1], device="cpu"))

    def vector_of(self, tensor: Tensor) -> Vector:
        """Returns a vector of a tensor ``[width]`` that has been computed under the recorder."""
        with self.recorder:
            value = self.recorder.value_of(tensor.to(torch.float32))
        self.recorder.uses(None, value)
        if self.recorder.needs(value) == Needs.NOTHING:
            self.constants.append(value)
            return Vector(len(self.constants) - 1, len(tensor), False)
        self.rows.append(value)
        self.row_width += len(tensor)
        return Vector(self.row_width - len(tensor), len(tensor), True)

    def matrix_of(self, tensor: Tensor) -> int:
        """Returns the number of a matrix ``[out, in]`` that has been computed under the recorder."""
        value = self.recorder.value_of(tensor)
        if tensor.dtype != torch.float32:
            raise NotLowered(f"it computes in {tensor.dtype}")
        if self.recorder.needs(value) != Needs.NOTHING:
            raise NotLowered("its weights follow the time or a condition")
        self.recorder.uses(None, value)
        self.matrices.append(value)
        return len(self.matrices) - 1

    # Instructions ----------------------------------------------------------------------------------------------------

    def new(self, width: int) -> int:
        """Returns a new value of the program."""
        self.widths.append(width)
        return len(self.widths) - 1

    def emit(
        self,
        kind: str,
        out: int,
        width: int,
        a: Part | None = None,
        b: Part | Vector | None = None,
        parameters: Sequence[float] = (),
        **options: Any,
    ) -> None:
        """Adds an instruction."""
        self.instructions.append(
            Instruction(kind, out, width, a, b, parameters=tuple(map(float, parameters)), **options)
        )

    def made(self, kind: str, a: Part, b: Part | Vector | None = None, *parameters: float) -> Part:
        """Adds an instruction and returns its result."""
        out = self.new(a.width)
        self.emit(kind, out, a.width, a, b, parameters)
        return Part(out, 0, a.width)

    def as_part(self, operand: Part | Vector) -> Part:
        """Returns an operand as a part of a value."""
        if isinstance(operand, Part):
            return operand
        out = self.new(operand.width)
        self.emit("fill", out, operand.width, b=operand)
        return Part(out, 0, operand.width)

    def result(self, part: Part, positions: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns the codes of a tensor whose elements at these positions ``[batch, width]`` are a part's units, and
        whose others are not yet known.
        """
        base = self.elements.base(part.value, self.widths[part.value])
        numbers = base + part.first + part.step * torch.arange(part.width, device="cpu")
        codes = torch.zeros(torch.Size(shape).numel(), dtype=torch.int64, device="cpu")
        codes[positions.reshape(-1)] = of_samples(numbers, self.batch).reshape(-1)
        return codes.reshape(tuple(shape))

    def finish(self, operation: Operation, part: Part, positions: Tensor) -> None:
        """Says that the units of a part are the elements of an operation's result at these positions."""
        output = operation.outputs[0]
        assert output is not None
        self.set(output, self.result(part, positions, output.tensor.shape))

    def finished(self, output: Value) -> Program:
        """Returns the program, without what its result does not need."""
        self.at = None
        result = self.run_of_units(self.codes_of(output))
        needed, kept = {result.value}, []
        for k in reversed(self.instructions):
            if k.out in needed:
                kept.append(k)
                needed |= {each.value for each in (k.a, k.b) if isinstance(each, Part)}
        return Program(tuple(self.widths), tuple(reversed(kept)), result, self.row_width)
