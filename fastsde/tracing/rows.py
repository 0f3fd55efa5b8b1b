"""A tape as rows: what lives across a network call is a slot, and everything between two calls is a row.

At the boundary before call k the loop has kept some values. Their rank is the number of slots; slot 0 is the network's
input. Row k starts with call k:

    inputs    the network's inputs, linear in the slots
    steps     clamps of linear values, and operations that are not affine, in order
    slots'    linear in the old slots, the outputs, the noises and the steps
    emitted   values that the loop returns

Row -1, the prologue, leads from the draws and the initial state to the first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import TraceError
from .tape import Call, Operation, Tape
from .values import Joined, Mover, Node, Positions, Value, added, is_zero, scaled, uniform

__all__ = ["Atom", "Leaf", "Part", "Row", "Step", "make_rows"]

_DEPENDENT = 1e-10  # relative residual below which a live value is a combination of others
_LARGEST = 1e6  # weight in such a combination: larger ones would cost digits in fp32
_LAST = 1 << 60


@dataclass(frozen=True)
class Atom:
    """What a row is linear in: a slot "s", an output "f", a noise "z", a clamp "D" or a result "o" of an operation."""

    kind: str
    index: int
    numel: int
    output: int = 0  # of an operation with several results


@dataclass
class Part:
    """A part of a network argument: scale * input[positions] + const. Without an input it is the constant alone."""

    shape: tuple[int, ...]
    input: int | None
    positions: Positions | None
    scale: Any
    const: Any


@dataclass
class Leaf:
    """A network argument that the state enters: parts concatenated along a dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Part]
    dim: int


@dataclass
class Step:
    """A clamp, or an operation with its operands."""

    values: list[Value]
    bounds: tuple[float, float] | None = None
    operation: Operation | None = None


@dataclass
class Row:
    """What happens from one network call to the next."""

    call: Call | None
    inputs: list[Value] = field(default_factory=list)
    leaves: dict[int, Leaf] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    noises: list[Node] = field(default_factory=list)
    update: list[Value] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the new slots
    emitted: dict[Node, Value] = field(default_factory=dict)

    @property
    def clamps(self) -> list[Step]:
        return [step for step in self.steps if step.bounds is not None]

    @property
    def operations(self) -> list[Step]:
        return [step for step in self.steps if step.operation is not None]

    def values(self) -> Iterator[Value]:
        """Yields all its linear values."""
        yield from self.inputs
        for step in self.steps:
            yield from step.values
        yield from self.update
        yield from self.emitted.values()


def make_rows(tape: Tape, outputs: Sequence[Value]) -> list[Row]:
    """Returns the prologue and a row per network call.

    Args:
        outputs: the values that must be known at the end, over nodes: `Row.emitted` has these nodes.

    Raises:
        TraceError: if a coefficient is NaN or infinite.
    """
    rows = _Rows(tape, outputs).rows
    while len(rows) > 2 and not rows[-1].emitted:  # what the loop calls last, and returns nothing of
        rows.pop()
        rows[-1].update = []
    for k, row in enumerate(rows):
        for value in row.values():
            for c in (*value.terms.values(), value.const):
                if not (bool(torch.isfinite(c).all()) if isinstance(c, Tensor) else -np.inf < c < np.inf):
                    raise TraceError(
                        "coefficient", f"the loop computes NaN or infinity before network call {k}", "its schedule"
                    )
    return rows


class _Rows:
    def __init__(self, tape: Tape, outputs: Sequence[Value]) -> None:
        self._tape, self._mover = tape, tape.mover
        self.rows: list[Row] = []
        self._inputs = [_inputs(call, k) for k, call in enumerate(tape.calls)]
        self._last: dict[Node, int] = {}  # the last boundary that a node must cross
        for k, (nodes, _) in enumerate(self._inputs):
            for node in nodes:
                self._use(node, k, k)
        self._emitted = list(dict.fromkeys(node for value in outputs for node in value.nodes()))
        for node in self._emitted:
            is_free = node.kind in ("noise", "input") and node not in self._last
            epoch = len(tape.calls) if is_free else node.epoch
            self._use(node, epoch, epoch - 1)
        self._build()

    def _use(self, node: Node, epoch: int, boundary: int) -> None:
        """Notes that a node is needed in an epoch, and must last until a boundary."""
        stack = [(node, epoch, boundary)]
        while stack:
            node, epoch, boundary = stack.pop()
            known = self._last.get(node)
            if node.kind in ("noise", "input"):  # they come into being where they are first used
                node.epoch = epoch if known is None else min(node.epoch, epoch)
            if known is None or known < boundary:
                self._last[node] = boundary
            if known is None:
                stack += [(child, node.epoch, node.epoch - 1) for child in node.children()]

    def _build(self) -> None:
        calls = self._tape.calls
        live: list[list[Node]] = [[] for _ in calls]
        for node, last in self._last.items():
            for k in range(node.epoch, min(last, len(calls) - 1) + 1):
                live[k].append(node)
        emitted: dict[int, list[Node]] = {}
        for node in self._emitted:
            emitted.setdefault(node.epoch, []).append(node)
        held: dict[Node, Value] = {}
        for epoch in range(len(calls) + 1):
            row = Row(calls[epoch - 1] if epoch else None)
            if epoch:
                nodes, row.leaves = self._inputs[epoch - 1]
                row.inputs = [held[node] for node in nodes]
            express = _Expressions(row, epoch, held, self._mover)
            row.emitted = {node: express(node) for node in emitted.get(epoch, ())}
            if epoch < len(calls):
                first = self._inputs[epoch][0]
                rest = sorted((n for n in live[epoch] if n not in first), key=lambda n: (n.epoch, n.order))
                nodes = [*first, *rest]
                basis, held = _basis(nodes, [express(node) for node in nodes])
                row.update = [express(node) for node in basis]
                row.shapes = [node.shape for node in basis]
            self.rows.append(row)


def _inputs(call: Call, k: int) -> tuple[list[Node], dict[int, Leaf]]:
    """Returns the values that the network's arguments are made of, as nodes, and how they are made of them."""
    nodes: list[Node] = []
    directions: list[Value] = []
    leaves = {}
    for i, (shape, dtype) in call.states.items():
        given = call.leaves[i]
        pieces = given.parts if isinstance(given, Joined) else [(given, shape)]
        parts = []
        for value, part_shape in pieces:
            value = _without_constants(value, k)
            inner, positions, scale = _factored(value)
            if inner is None:
                parts.append(Part(part_shape, None, None, 0.0, value.const))
                continue
            number = None
            for j, direction in enumerate(directions):
                ratio = _ratio(inner, direction)
                if ratio is not None:
                    number, scale = j, scale * ratio
                    break
            if number is None:
                number = len(nodes)
                directions.append(inner)
                nodes.append(_node_of(inner, k, part_shape if positions is None else None))
            parts.append(Part(part_shape, number, positions, scale, value.const))
        leaves[i] = Leaf(shape, dtype, parts, given.dim if isinstance(given, Joined) else 0)
    return nodes, leaves


def _without_constants(value: Value, k: int) -> Value:
    """Returns a value in which sums of this row with a constant are written out, so that the constant stands apart."""
    for node, positions in list(value.terms):
        own = node.value
        if node.kind != "affine" or node.epoch != k or positions is not None or own is None or is_zero(own.const):
            continue
        c = value.terms[node, positions]
        rest = Value(value.numel, {key: x for key, x in value.terms.items() if key[0] is not node}, value.const)
        return _without_constants(added(rest, scaled(own, c)), k)
    return value


def _factored(value: Value) -> tuple[Value | None, Positions | None, Any]:
    """Returns (inner, positions, scale) with value = scale * inner[positions] + const, where inner has no positions."""
    if not value.terms:
        return None, None, 0.0
    kinds = {positions for _, positions in value.terms}
    sizes = {node.numel for node, _ in value.terms}
    vectors = [c for c in value.terms.values() if isinstance(c, Tensor)]
    if len(kinds) == 1 and len(sizes) == 1:
        (positions,) = kinds
        if not vectors:
            inner = Value(sizes.pop(), {(node, None): c for (node, _), c in value.terms.items()})
            return inner, positions, 1.0
        if len(value.terms) == 1:
            ((node, _),), (c,) = value.terms, vectors
            return Value(node.numel, {(node, None): 1.0}), positions, c
    return Value(value.numel, dict(value.terms)), None, 1.0  # of the argument's own size


def _ratio(value: Value, direction: Value) -> float | None:
    """Returns r if value = r direction."""
    if value.terms.keys() != direction.terms.keys():
        return None
    found = None
    for key, c in value.terms.items():
        other = direction.terms[key]
        if isinstance(c, Tensor) or isinstance(other, Tensor):
            if not (isinstance(c, Tensor) and isinstance(other, Tensor) and torch.equal(c, other)):
                return None
            ratio = 1.0
        else:
            ratio = c / other
        if found is not None and abs(ratio - found) > 1e-14 * abs(found):
            return None
        found = ratio
    return found


def _node_of(inner: Value, k: int, shape: tuple[int, ...] | None) -> Node:
    if inner.is_atom:
        ((node, positions),) = inner.terms
        if positions is None:
            own: Node = node
            return own
    node = Node("affine", k, shape or _shape_of(inner), value=inner)
    node.order = _LAST + k
    return node


def _shape_of(value: Value) -> tuple[int, ...]:
    node = next(iter(value.nodes()))
    return tuple(node.shape) if node.numel == value.numel else (value.numel,)


class _Expressions:
    """Expresses nodes over the atoms of a row; clamps and operations become steps of the row."""

    def __init__(self, row: Row, epoch: int, held: dict[Node, Value], mover: Mover) -> None:
        self._row, self._epoch, self._held, self._mover = row, epoch, held, mover
        self._memo: dict[Node, Value] = {}
        self._done: dict[int, int] = {}

    def __call__(self, node: Node) -> Value:
        memo = self._memo
        if node not in memo:
            stack, needed = [node], dict[Node, None]()
            while stack:
                each = stack.pop()
                if each not in memo and each not in needed:
                    needed[each] = None
                    if each.epoch == self._epoch:
                        stack += each.children()
            for each in sorted(needed, key=lambda n: n.order):
                memo[each] = self._single(each)
        return memo[node]

    def _single(self, node: Node) -> Value:
        """Expresses a node whose children are known."""
        row = self._row
        if node.epoch < self._epoch:
            return self._held[node]
        if node.kind == "output":
            return _atom(Atom("f", node.label, node.numel))
        if node.kind == "opaque":
            operation, i = node.made_by
            if id(operation) not in self._done:
                self._done[id(operation)] = len(row.operations)
                row.steps.append(Step([self._total(value) for value in operation.operands], operation=operation))
            return _atom(Atom("o", self._done[id(operation)], node.numel, i))
        if node.kind in ("noise", "input"):
            row.noises.append(node)
            return _atom(Atom("z", len(row.noises) - 1, node.numel))
        assert node.value is not None
        total = self._total(node.value)
        if node.kind == "clamp":
            row.steps.append(Step([total], bounds=node.bounds))
            return _atom(Atom("D", len(row.clamps) - 1, node.numel))
        return total

    def _total(self, value: Value) -> Value:
        total = Value(value.numel, {}, value.const)
        for (child, positions), c in value.terms.items():
            total = added(total, scaled(self._mover.gather(self._memo[child], positions), c))
        return total


def _atom(atom: Atom) -> Value:
    return Value(atom.numel, {(atom, None): 1.0})


def _basis(nodes: list[Node], values: list[Value]) -> tuple[list[Node], dict[Node, Value]]:
    """Returns a basis of the live values, and every live node over it."""
    basis: list[Node] = []
    chosen: list[Value] = []
    held: dict[Node, Value] = {}
    for node, value in zip(nodes, values, strict=True):
        found = _combination(value, chosen) if chosen or not value.terms else None
        if found is None:
            held[node] = _atom(Atom("s", len(basis), node.numel))
            basis.append(node)
            chosen.append(value)
        else:
            held[node] = found
    return basis, held


def _combination(value: Value, chosen: Sequence[Value]) -> Value | None:
    """Returns a value as an affine combination of chosen ones of its size, or None if it is none."""
    if not value.terms:
        return Value(value.numel, {}, value.const)
    same = [(i, v) for i, v in enumerate(chosen) if v.numel == value.numel]
    known = {key for _, v in same for key in v.terms}
    if not value.terms.keys() <= known:
        return None
    keys = list(dict.fromkeys([*value.terms, *(key for _, v in same for key in v.terms)]))
    vectors = [*(v for _, v in same), value]
    is_flat = any(isinstance(c, Tensor) for v in vectors for c in v.terms.values())
    columns = np.zeros((value.numel if is_flat else 1, len(keys), len(vectors)))
    for j, v in enumerate(vectors):
        for i, key in enumerate(keys):
            if key in v.terms:
                c = v.terms[key]
                columns[:, i, j] = c.numpy() if isinstance(c, Tensor) else c
    target, matrix = columns[:, :, -1:], columns[:, :, :-1]
    norm = np.linalg.norm(target, axis=(1, 2))
    scale = np.linalg.norm(matrix, axis=1, keepdims=True)
    scale[scale == 0] = 1
    matrix = matrix / scale
    weights = np.linalg.pinv(matrix, rcond=1e-12) @ target
    residual = np.linalg.norm(matrix @ weights - target, axis=(1, 2))
    if (residual > _DEPENDENT * norm).any() or np.abs(weights).max(initial=0) > _LARGEST * norm.max(initial=1e-300):
        return None
    weights = weights[:, :, 0] / scale[:, 0, :]
    weights[np.abs(weights) < 1e-13 * np.abs(weights).max(initial=0)] = 0
    total = Value(value.numel, {}, value.const)
    for j, (i, v) in enumerate(same):
        w = uniform(torch.as_tensor(weights[:, j].copy()))
        if not is_zero(w):
            total.terms[(Atom("s", i, v.numel), None)] = w
            total.const = total.const - v.const * w
    return total
