"""A program as a `StepTable`, where it is one, and how its network is called.

A program is a table if in each row one network is called with one input, the state's slots have one shape, and

    D  = clamp(p.s + q f, -clip, clip)        at most one, with the same clip in all rows
    s' = A s + b f + e D + d z                f: one combination of the outputs, z: one combination of the noises

with coefficients that do not differ from element to element. Constants that a loop adds to its state are taken out:
the table runs the state minus the constants that have come together so far, its *shift*, and they are added where the
network is called and where the state is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..solvers import MAX_SLOTS, StepTable
from .calls import Calls, NotATable, Output, calls_of
from .program import Program
from .rows import Leaf, Row, Step
from .values import Node, Positions, Value

__all__ = ["NotATable", "Returned", "Tabulated", "tabulate"]

_PARALLEL = 1e-9  # relative size of what is left of a vector beside another, below which they are parallel


@dataclass(frozen=True)
class Returned:
    """An emitted node: scale * slot 0 after a number of rows + const, and what is done to it after the last row.

    ``positions`` say which element of that each of its own is.
    """

    rows: int
    scale: float
    const: float
    positions: Positions | None = None
    after: tuple[tuple[Step, Value], ...] = ()  # each step, and its result's value over the step before


@dataclass
class Tabulated:
    """A program as a table.

    Args:
        shape: ``(B, *shape)`` of the traced state.
        scale: the initial slot 0 is this times ``start``.
        start: the nodes and weights of the first draw, whose weights have norm 1, and of the initial state.
        start_positions: which element of these each element of slot 0 is.
        noises: for each row, the nodes and weights of its noise; the weights have norm 1.
        returned: how the emitted nodes follow from the states.
        calls: how the network is called.
    """

    table: StepTable
    shape: tuple[int, ...]
    scale: float
    start: list[tuple[Node, float]]
    start_positions: Positions | None
    noises: list[list[tuple[Node, float]]]
    returned: dict[Node, Returned]
    calls: Calls

    @property
    def needs_trajectory(self) -> bool:
        return any(each.rows < len(self.table) for each in self.returned.values())


@dataclass
class _Coefficients:
    """A row's coefficients by target: the new slots, then the argument of the clamp."""

    s: list[list[float]] = field(default_factory=list)
    f: list[dict[tuple[int, Positions | None], float]] = field(default_factory=list)
    D: list[float] = field(default_factory=list)
    z: list[dict[int, float]] = field(default_factory=list)
    const: list[float] = field(default_factory=list)


def tabulate(program: Program) -> Tabulated:
    """Returns a program as a table.

    Raises:
        NotATable: if it is none; the message says why.
    """
    rows = program.rows
    if program.slots > MAX_SLOTS:
        raise NotATable(f"it keeps {program.slots} slots, and a table has at most {MAX_SLOTS}")
    last, after = _ending(program)
    final = [*rows[:-1], last]
    shape = _shape(final)
    slots = max(len(row.update) for row in final)
    scale, start, moved = _start(rows[0])
    count = len(rows) - 1
    arrays = {name: np.zeros((count, slots)) for name in "pbed"}
    A, q = np.zeros((count, slots, slots)), np.zeros(count)
    clip: float | None = None
    shift = np.array([_constant(rows[0].update[0])])
    shifts, leaves = [shift], []
    noises: list[list[tuple[Node, float]]] = []
    outputs: list[list[Output]] = []
    for k, row in enumerate(final[1:]):
        clip = _clip(row, clip)
        c = _coefficients(row, slots)
        weights, f = _direction(c.f, "its row uses two combinations of the network's outputs")
        outputs.append([Output(index, positions, w) for (index, positions), w in weights.items()])
        noise, z = _direction(c.z, "its row uses two independent noises")
        norm = float(np.linalg.norm(list(noise.values()))) if noise else 1.0
        noises.append([(row.noises[i], w / norm) for i, w in noise.items()])
        n = len(row.update)
        leaves.append(_shifted(row, float(shift[0])))
        shift = _next_shift(row, c, shift)
        shifts.append(shift)
        A[k, :n] = c.s[:n]
        arrays["b"][k, :n], arrays["e"][k, :n], arrays["d"][k, :n] = f[:n], c.D[:n], [norm * each for each in z[:n]]
        if row.clamps:
            arrays["p"][k], q[k] = c.s[n], f[n]
    calls = calls_of(program, leaves, shape, outputs)
    columns = {name: torch.from_numpy(array) for name, array in (*arrays.items(), ("A", A), ("q", q))}
    try:
        table = StepTable(calls.time, clip=clip, **columns)
    except ValueError as error:
        raise NotATable(str(error)) from error
    returned = {}
    for epoch, row in enumerate(final):
        for node, value in row.emitted.items():
            returned[node] = _returned(epoch, value, row.update[0], float(shifts[epoch][0]))
    for node, (target, steps) in after.items():
        found = _returned(count, target, last.update[0], float(shift[0]))
        returned[node] = replace(found, rows=count, after=steps)
    return Tabulated(table, shape, scale, start, moved, noises, returned, calls)


def _shape(rows: Sequence[Row]) -> tuple[int, ...]:
    shape = rows[0].shapes[0]
    for row in rows:
        if len(row.inputs) > 1:
            raise NotATable("its network has two inputs that depend on the state")
        numels = {value.numel for value in row.update}
        if numels and numels != {torch.Size(shape).numel()}:
            raise NotATable("its slots differ in size")
    return shape


def _start(prologue: Row) -> tuple[float, list[tuple[Node, float]], Positions | None]:
    if len(prologue.update) != 1:
        raise NotATable(f"it starts with {len(prologue.update)} slots that are not zero")
    if prologue.steps:
        raise NotATable("it clamps its first draw or state")
    value = prologue.update[0]
    weights: dict[int, float] = {}
    moved = {positions for _, positions in value.terms}
    for (atom, positions), c in value.terms.items():
        _check_uniform(c, positions if len(moved) > 1 else None)
        weights[atom.index] = c  # type: ignore[assignment]
    nodes = [(prologue.noises[i], w) for i, w in weights.items()]
    drawn = [w for node, w in nodes if node.kind == "noise"]
    scale = nodes[0][1] if len(nodes) == 1 else float(np.linalg.norm(drawn))
    return scale, [(node, w / scale) for node, w in nodes], next(iter(moved))


def _check_uniform(c: Any, positions: Positions | None) -> None:
    if positions is not None:
        raise NotATable("it moves elements of the state between rows")
    if isinstance(c, Tensor):
        raise NotATable("its coefficients differ from element to element")


def _constant(value: Value) -> float:
    if isinstance(value.const, Tensor):
        raise NotATable("it adds constants that differ from element to element")
    return value.const


def _shifted(row: Row, shift: float) -> dict[int, Leaf]:
    """Returns the network's arguments from a state without its shift."""
    if shift == 0:
        return row.leaves
    return {
        i: replace(
            leaf,
            parts=[
                part if part.input is None else replace(part, const=part.const + shift * part.scale)
                for part in leaf.parts
            ],
        )
        for i, leaf in row.leaves.items()
    }


def _next_shift(row: Row, c: _Coefficients, shift: Any) -> Any:
    """Returns the shift of the new slots."""
    n, old = len(row.update), len(shift)
    found = np.array(c.s)[:, :old] @ shift + np.array(c.const)
    if np.any(found[n:] != 0):
        raise NotATable("it clamps a value to which constants were added")
    return found[:n]


def _clip(row: Row, clip: float | None) -> float | None:
    if row.operations:
        step = row.operations[0]
        assert step.operation is not None
        raise NotATable(f"it runs {step.operation.name} between rows")
    if len(row.clamps) > 1:
        raise NotATable("it clamps twice in a row")
    for step in row.clamps:
        assert step.bounds is not None
        low, high = step.bounds
        if low != -high:
            raise NotATable(f"it clamps to {low:g} .. {high:g}, which is not symmetric")
        if clip is not None and clip != high:
            raise NotATable(f"it clamps to {clip:g} in one row and to {high:g} in another")
        clip = high
    return clip


def _coefficients(row: Row, slots: int) -> _Coefficients:
    c = _Coefficients()
    values = [*row.update, *(step.values[0] for step in row.clamps)]
    for number, value in enumerate(values):
        s, f, data, z = [0.0] * slots, dict[tuple[int, Positions | None], float](), 0.0, dict[int, float]()
        for (atom, positions), weight in value.terms.items():
            _check_uniform(weight, None if atom.kind == "f" else positions)
            if atom.kind == "s":
                s[atom.index] = weight
            elif atom.kind == "f":
                f[atom.index, positions] = weight  # type: ignore[assignment]
            elif atom.kind == "D":
                data = weight  # type: ignore[assignment]
            elif row.noises[atom.index].kind == "input":
                raise NotATable("it uses its initial state again after the first row")
            else:
                z[atom.index] = weight  # type: ignore[assignment]
        if number >= len(row.update) and (z or data):
            raise NotATable("it clamps a value that has noise")
        c.s.append(s)
        c.f.append(f)
        c.D.append(data)
        c.z.append(z)
        c.const.append(_constant(value))
    return c


def _direction(targets: Sequence[dict[Any, float]], why: str) -> tuple[dict[Any, float], list[float]]:
    """Returns the one combination that all targets use, and how much of it each target uses."""
    keys = list(dict.fromkeys(key for target in targets for key in target))
    if not keys:
        return {}, [0.0] * len(targets)
    matrix = np.array([[target.get(key, 0.0) for key in keys] for target in targets])
    if len(keys) == 1:
        return {keys[0]: 1.0}, matrix[:, 0].tolist()
    largest = matrix[np.abs(matrix).sum(axis=1).argmax()]
    pivot = int(np.abs(largest).argmax())
    direction = largest / largest[pivot]
    amounts = matrix[:, pivot]
    if np.abs(matrix - np.outer(amounts, direction)).max() > _PARALLEL * np.abs(matrix).max():
        raise NotATable(why)
    return dict(zip(keys, direction.tolist(), strict=True)), amounts.tolist()


# The last row ---------------------------------------------------------------------------------------------------------


def _ending(program: Program) -> tuple[Row, dict[Node, tuple[Value, tuple[tuple[Step, Value], ...]]]]:
    """Returns the last row with the result as its one slot, and how the nodes that are returned follow from linear
    values: the value of each, and the clamps and operations after it.

    Clamps and operations are first taken to belong to the row; if that is no table, they are done to the result.
    """
    row = program.rows[-1]
    if not row.emitted:
        raise NotATable("nothing of the last row is returned")
    results: dict[tuple[str, int], Step] = {}
    clamps = operations = 0
    for step in row.steps:
        kind = "D" if step.bounds is not None else "o"
        results[kind, clamps if kind == "D" else operations] = step
        clamps, operations = clamps + (kind == "D"), operations + (kind == "o")
    targets: dict[Node, tuple[Value, tuple[tuple[Step, Value], ...]]] = {
        node: (value, ()) for node, value in row.emitted.items()
    }
    reason: NotATable | None = None
    for _ in range(len(row.steps) + 1):
        try:
            return _closed(row, targets), targets
        except NotATable as error:
            reason = reason or error
        peeled = {node: _peeled(value, steps, results) for node, (value, steps) in targets.items()}
        if any(each is None for each in peeled.values()):
            break
        targets = {node: each for node, each in peeled.items() if each is not None}
    assert reason is not None
    raise reason


def _peeled(
    value: Value, steps: tuple[tuple[Step, Value], ...], results: dict[tuple[str, int], Step]
) -> tuple[Value, tuple[tuple[Step, Value], ...]] | None:
    """Returns the argument of the clamp or operation that a value is made of alone, with the step in front."""
    if len(value.terms) != 1:
        return None
    ((atom, _),) = value.terms
    step = results.get((atom.kind, atom.index))
    if step is None or len(step.values) != 1:
        return None
    return step.values[0], ((step, value), *steps)


def _closed(row: Row, targets: dict[Node, tuple[Value, tuple[tuple[Step, Value], ...]]]) -> Row:
    """Returns the row with the one result that all targets are multiples of as its slot, and the steps that it uses."""
    values = [value for value, _ in targets.values()]
    base = max(values, key=lambda value: len(value.terms))
    result = Value(base.numel, dict(base.terms))
    for value in values:
        _returned(0, value, result, 0.0)
    used = {atom.index for (atom, _) in result.terms if atom.kind == "D"}
    if any(atom.kind == "o" for atom, _ in result.terms):
        raise NotATable("its result comes from an operation that is not affine")
    if len(used) > 1:
        raise NotATable("it clamps twice in a row")
    steps = [step for i, step in enumerate(row.clamps) if i in used]
    terms = {
        (replace(atom, index=0) if atom.kind == "D" else atom, positions): c
        for (atom, positions), c in result.terms.items()
    }
    closed = Row(row.call, row.inputs, row.leaves, steps, row.noises, [Value(result.numel, terms)])
    _clip(closed, None)
    _coefficients(closed, MAX_SLOTS)
    return closed


def _returned(rows: int, value: Value, state: Value, shift: float) -> Returned:
    """Returns a value as a multiple of a state, both over the atoms of a row; the table has it without its shift."""
    why = NotATable("it returns something else than its state")
    for terms in (value.terms, state.terms):
        for (atom, positions), c in terms.items():
            _check_uniform(c, None if atom.kind == "f" or terms is value.terms else positions)
    const = _constant(value)
    if value.numel != state.numel:
        raise why
    ours, own = _by_place(value), _by_place(state)
    moved = None
    if ours.keys() != own.keys():  # the same, moved
        places = {positions for _, positions in value.terms}
        if len(places) != 1 or any(positions is not None for _, positions in state.terms):
            raise NotATable("it moves elements of the state between rows") if None not in places else why
        (moved,) = places
        ours = {(kind, index, None): c for (kind, index, _), c in ours.items()}
    if ours.keys() != own.keys() or not own:
        raise why
    scale: float | None = None
    for key, c in ours.items():
        ratio = c / own[key]
        if scale is not None and abs(ratio - scale) > _PARALLEL * abs(scale):
            raise why
        scale = ratio
    assert scale is not None
    return Returned(rows, scale, const + scale * (shift - _constant(state)), moved)


def _by_place(value: Value) -> dict[Any, Any]:
    """Returns the coefficients; a row has at most one clamp, whatever its number."""
    return {(atom.kind, 0 if atom.kind == "D" else atom.index, place): c for (atom, place), c in value.terms.items()}
