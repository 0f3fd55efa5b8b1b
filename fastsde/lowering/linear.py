"""Linear layers as instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .builder import Builder
from .elementwise import Rule
from .program import Part, Vector
from .recording import Needs, NotLowered, Operation, Value

__all__ = ["RULES"]


def _addmm(builder: Builder, operation: Operation) -> None:
    (bias, a, b), kwargs = operation.arguments()
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        raise NotLowered("it has factors")
    _product(builder, operation, a, b, bias)


def _mm(builder: Builder, operation: Operation) -> None:
    (a, b), _ = operation.arguments()
    _product(builder, operation, a, b)


def _bmm(builder: Builder, operation: Operation) -> None:
    (a, b), _ = operation.arguments()
    if len(a.tensor) != 1:
        raise NotLowered("it multiplies a matrix per sample, or for several parts of each sample")
    _product(builder, operation, a, b)


def _product(builder: Builder, operation: Operation, a: Value, b: Value, bias: Value | None = None) -> None:
    """a b + bias, where either factor follows the state and the other is a weight."""
    if builder.is_traced(a) and builder.is_traced(b):
        raise NotLowered("both of its factors follow the state, as in attention")
    turned = builder.is_traced(b)
    x, weight = (b, a) if turned else (a, b)
    codes, matrix = builder.codes_of(x), weight.tensor
    if codes.ndim == 3:
        codes = codes[0]
    if turned:
        codes = codes.t()
    with builder.recorder:
        if matrix.ndim == 3:
            matrix = matrix[0]
        if matrix.ndim == 1:
            matrix = matrix[None]
        elif not turned:
            matrix = matrix.t()
    if len(codes) != builder.batch:
        raise NotLowered("it is applied to several parts of each sample")
    part = _linear(builder, builder.by_row(codes), matrix, bias)
    output = operation.outputs[0]
    assert output is not None
    order = torch.arange(builder.batch * part.width, device="cpu").reshape(builder.batch, part.width)
    found = builder.result(part, order, (builder.batch, part.width))
    builder.set(output, (found.t() if turned else found).reshape(output.tensor.shape))


def _linear(builder: Builder, numbers: Tensor, matrix: Tensor, bias: Value | None) -> Part:
    """Returns matrix x + bias. What is known ahead of x is multiplied ahead."""
    runs = builder.elements.runs(numbers)
    ends = torch.tensor([run.length for run in runs], device="cpu").cumsum(0).tolist()
    kept: list[int] = []
    known = []
    for run, end in zip(runs, ends, strict=True):
        if isinstance(run.source, Value):
            builder.recorder.uses(builder.at, run.source)
            known.append((run, run.source, end))
        else:
            kept += range(end - run.length, end)
    start, per_sample = None if bias is None else _bias(builder, bias, len(matrix)), None
    with builder.recorder:
        for run, source, end in known:
            columns = matrix[:, end - run.length : end]
            if builder.recorder.needs(source) == Needs.CONDITION:
                product = builder.gathered_conditions(run) @ columns.t()
                per_sample = product if per_sample is None else per_sample + product
            else:
                product = columns @ builder.gathered(run).to(columns.dtype)
                start = product if start is None else start + product
    out = builder.new(len(matrix))
    begin: Part | Vector | None = None if start is None else builder.vector_of(start)
    if per_sample is not None:
        given = builder.part_of_conditions(per_sample)
        begin = given if begin is None else builder.made("add", given, begin)
    if not kept:
        assert begin is not None
        return builder.as_part(begin)
    _products(builder, out, numbers[kept], matrix, kept, begin)
    return Part(out, 0, len(matrix))


def _bias(builder: Builder, bias: Value, width: int) -> Tensor:
    builder.recorder.uses(builder.at, bias)
    if builder.recorder.needs(bias) not in (Needs.NOTHING, Needs.TIME) or bias.tensor.numel() not in (1, width):
        raise NotLowered("its bias is not one number per unit")
    with builder.recorder:
        return bias.tensor.reshape(-1).expand(width)


def _products(
    builder: Builder, out: int, numbers: Tensor, matrix: Tensor, columns: Sequence[int], begin: Part | Vector | None
) -> None:
    """Adds the products of columns of a matrix with units, run by run."""
    runs = builder.elements.runs(numbers)
    copies = len(runs) > 4 or any(run.step == 0 for run in runs)
    lengths = [len(numbers)] if copies else [run.length for run in runs]
    first = 0
    for each in map(builder.units, torch.split(numbers, lengths)):
        own = list(columns[first : first + each.width])
        is_range = own == list(range(own[0], own[0] + len(own)))
        with builder.recorder:
            weight = matrix[:, own[0] : own[0] + len(own)] if is_range else matrix[:, own]
        builder.emit("linear", out, len(matrix), each, begin, weight=builder.matrix_of(weight))
        first, begin = first + each.width, Part(out, 0, len(matrix))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("mm", "mv"), _mm),
    "addmm": _addmm,
    "bmm": _bmm,
}
