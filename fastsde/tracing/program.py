"""A traced loop as a program of rows, and its execution in plain PyTorch.

The execution takes any program, in any dtype, with given draws: it is the reference of tracing. Where the rows make a
`StepTable`, the package's engines run them instead (`tabulate`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import TraceError
from .rows import Leaf, Part, Row, Step, make_rows
from .tape import Draw, Tape
from .values import Joined, Node, Value

__all__ = ["Output", "Program", "evaluate", "execute"]

NoiseSource = Callable[[Node], Tensor]


class Output:
    """A tensor that the loop returns: its value over nodes, in parts where it is made of parts."""

    def __init__(self, value: Value | Joined, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.value, self.shape, self.dtype = value, tuple(shape), dtype

    @property
    def parts(self) -> list[Value]:
        return [value for value, _ in self.value.parts] if isinstance(self.value, Joined) else [self.value]

    def build(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the tensor from its parts, in any shape."""
        if not isinstance(self.value, Joined):
            return parts[0].reshape(self.shape)
        shaped = [part.reshape(shape) for part, (_, shape) in zip(parts, self.value.parts, strict=True)]
        return torch.cat(shaped, dim=self.value.dim).reshape(self.shape)


class Program:
    """What a trace found.

    Args:
        tape: the tape of the loop.
        leaves: what the loop returned, with an ``Output`` for each traced tensor.
        spec: how the leaves are nested, by PyTorch's pytree.

    Attributes:
        rows: the rows, of which the first is what comes before the first network call.
        calls: what the network is given in each call.
        draws: the normal draws of the loop, in its order.
        notes: what a user should know, such as a Brownian tree that became independent normals.
        state: the name of the loop's argument that is the initial state, or None.
    """

    def __init__(self, tape: Tape, leaves: list[Any], spec: Any) -> None:
        self.leaves, self.spec = leaves, spec
        self.outputs = [leaf for leaf in leaves if isinstance(leaf, Output)]
        self.draws: list[Draw] = tape.draws
        self.notes = list(tape.notes)
        self.mover = tape.mover
        self.device = tape.device
        self.state: str | None = None  # the name of the loop's argument that is the initial state
        self.writes_state = False  # whether the loop changes its initial state in place: the last of the leaves
        self.modes: dict[int, list[bool]] = {}  # by network: which of its modules were in training mode
        self.sets_modes: set[int] = set()  # the networks whose modes the loop changes
        self.weights_read = list(tape.weights_read.values())
        self.generator_states = tape.generator_states
        self.watched = tape.watched  # the ids of the tensors that the loop was given
        self.baked_ids: frozenset[int] = frozenset()  # of those that take part in the loop's arithmetic
        self.rows: list[Row] = make_rows(tape, [part for output in self.outputs for part in output.parts])
        self.calls = [row.call for row in self.rows if row.call is not None]

    @property
    def slots(self) -> int:
        """The largest number of slots."""
        return max((len(row.update) for row in self.rows), default=0)

    @property
    def operations(self) -> list[Step]:
        """The operations that are not affine, and are run again in each row."""
        return [step for row in self.rows[:-1] for step in row.operations]

    def refuse_operations(self) -> None:
        """Raises the refusal of the first operation that is not affine and that a later row needs."""
        for row in self.rows[:-1]:
            for step in row.operations:
                assert step.operation is not None
                error = step.operation.error
                raise TraceError(error.operation, error.reason, error.line, _INSTEAD)

    def summary(self) -> dict[str, Any]:
        """Returns the size of the program: slots, and the largest number of each thing in a row."""
        rows = self.rows[1:]

        def most(count: Callable[[Row], int], over: Sequence[Row]) -> int:
            return max(map(count, over), default=0)

        return {
            "calls": len(rows),
            "slots": self.slots,
            "noises": most(lambda row: len(row.noises), self.rows),
            "clamps": most(lambda row: len(row.clamps), rows),
            "operations": sorted({step.operation.name for step in self.operations if step.operation is not None}),
            "inputs": most(lambda row: len(row.inputs), rows),
        }

    def run(
        self,
        networks: Sequence[Callable[..., Any]],
        noises: Sequence[Tensor],
        dtype: torch.dtype = torch.float64,
        state: Tensor | None = None,
    ) -> Any:
        """Runs the rows in PyTorch and returns what the loop returns.

        Args:
            networks: called as the loop calls them, in the order of the trace.
            noises: a tensor per draw, in the loop's order.
            dtype: of the state; floating-point arguments of the networks are cast to it.
            state: the initial state, if the loop is given one.
        """

        def source(node: Node) -> Tensor:
            if node.kind == "input":
                assert state is not None
                return state.to(dtype).reshape(-1)
            labels = node.label if isinstance(node.label, tuple) else (node.label,)
            return torch.cat([noises[label].to(dtype).reshape(-1) for label in labels])

        found = execute(self, networks, source, dtype, casts=True)
        return self.returned(found, dtype)

    def returned(
        self,
        found: Mapping[Node, Tensor],
        dtype: torch.dtype | None = None,
        state: Tensor | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """Returns what the loop returns, from the emitted nodes; in the loop's dtypes if none is given."""
        leaves = []
        for leaf in self.leaves:
            if not isinstance(leaf, Output):
                leaves.append(constant_result(leaf, given))
                continue
            parts = []
            for value in leaf.parts:
                like = next((found[node] for node in value.nodes()), None)
                kind = dtype or (leaf.dtype if like is None else like.dtype)
                parts.append(evaluate(value, found, kind, self.device))
            leaves.append(leaf.build(parts).to(dtype or leaf.dtype))
        return self.unflattened(leaves, state)

    def unflattened(
        self, leaves: list[Any], state: Tensor | None = None, given: Mapping[int, Tensor] | None = None
    ) -> Any:
        """Returns the leaves as the loop returns them, and writes what it leaves in its initial state.

        Args:
            given: tensors instead of those that the loop was given, by the ids of these.
        """
        if self.writes_state:
            *leaves, left = leaves
            if state is not None:
                state.copy_(left)
        return tree_unflatten(leaves, self.spec)


def constant_result(leaf: Any, given: Mapping[int, Tensor] | None) -> Any:
    """Returns what a loop returns besides its states: tensors that it was given, or copies of its own constants."""
    if given and id(leaf) in given:
        return given[id(leaf)]
    return copy.copy(leaf) if isinstance(leaf, np.ndarray) else leaf.clone() if isinstance(leaf, Tensor) else leaf


_INSTEAD = "replay=True runs it again between the rows; a table cannot hold it"


def execute(
    program: Program,
    networks: Sequence[Callable[..., Any]],
    noise: NoiseSource,
    dtype: torch.dtype,
    *,
    casts: bool = False,
    arguments: Mapping[int, Tensor] | None = None,
) -> dict[Node, Tensor]:
    """Runs all rows and returns the emitted nodes, flat.

    Args:
        noise: returns the flat noise or initial state of a node.
        casts: whether floating-point arguments of the networks are cast to ``dtype``.
        arguments: tensors to give to the networks instead of the constants with these ids.
    """
    emitted: dict[Node, Tensor] = {}
    slots: list[Tensor] = []
    device = program.device
    for row in program.rows:
        atoms: dict[Any, Tensor] = {("s", i): slot for i, slot in enumerate(slots)}
        if row.call is not None:
            outputs = _call_network(row, networks, atoms, dtype, device, casts, arguments or {})
            atoms.update({("f", i): f for i, f in enumerate(outputs)})
        for i, node in enumerate(row.noises):
            atoms["z", i] = noise(node)
        _run_steps(row, atoms, dtype, device)
        emitted.update({node: evaluate(value, atoms, dtype, device) for node, value in row.emitted.items()})
        slots = [evaluate(value, atoms, dtype, device) for value in row.update]
    return emitted


def _call_network(
    row: Row,
    networks: Sequence[Callable[..., Any]],
    atoms: Mapping[Any, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    casts: bool,
    arguments: Mapping[int, Tensor],
) -> list[Tensor]:
    call = row.call
    assert call is not None
    inputs = [evaluate(value, atoms, dtype, device) for value in row.inputs]
    leaves = [arguments.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
    for i, leaf in row.leaves.items():
        leaves[i] = build_leaf(leaf, inputs, dtype, device).to(dtype if casts else leaf.dtype)
    if casts:
        leaves = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    args, kwargs = tree_unflatten(leaves, call.spec)
    with under(call.autocast, device):
        found, _ = tree_flatten(networks[call.network](*args, **kwargs))
    return [found[place].to(dtype).reshape(-1) for place in call.places]


def under(autocast: tuple[bool, torch.dtype] | None, device: torch.device) -> AbstractContextManager[Any]:
    """Returns the context of a network call: autocast as the loop sets it."""
    if autocast is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=autocast[0], dtype=autocast[1], cache_enabled=False)


def build_leaf(leaf: Leaf, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a network argument from the flat inputs."""
    parts = [_build_part(part, inputs, dtype, device) for part in leaf.parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=leaf.dim)
    return whole.reshape(leaf.shape)


def _build_part(part: Part, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    numel = torch.Size(part.shape).numel()
    if part.input is None:
        return _constant(part.const, numel, dtype, device).reshape(part.shape)
    x = inputs[part.input]
    x = x if part.positions is None else x[part.positions.idx.to(device)]
    if isinstance(part.scale, Tensor) or part.scale != 1:
        x = x * (part.scale.to(device, dtype) if isinstance(part.scale, Tensor) else part.scale)
    if isinstance(part.const, Tensor) or part.const != 0:
        x = x + (part.const.to(device, dtype) if isinstance(part.const, Tensor) else part.const)
    return x.reshape(part.shape)


def _constant(c: Any, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return c.to(device, dtype) if isinstance(c, Tensor) else torch.full((numel,), c, dtype=dtype, device=device)


def _run_steps(row: Row, atoms: dict[Any, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    clamps = operations = 0
    for step in row.steps:
        values = [evaluate(value, atoms, dtype, device) for value in step.values]
        if step.bounds is not None:
            atoms["D", clamps] = values[0].clamp(*step.bounds)
            clamps += 1
            continue
        assert step.operation is not None
        for output, x in enumerate(run_operation(step, values)):
            if x is not None:
                atoms["o", operations, output] = x.reshape(-1)
        operations += 1


def run_operation(step: Step, values: Sequence[Tensor]) -> list[Tensor | None]:
    """Runs an operation again, and returns its results; None for those that are no tensors."""
    operation = step.operation
    assert operation is not None
    leaves = list(operation.leaves)
    for (i, (shape, _)), value in zip(operation.states.items(), values, strict=True):
        leaves[i] = value.reshape(shape)
    args, kwargs = tree_unflatten(leaves, operation.spec)
    found, _ = tree_flatten(operation.function(*args, **kwargs))
    return [x if isinstance(x, Tensor) else None for x in found]


def evaluate(value: Value, atoms: Mapping[Any, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a value, flat. ``atoms`` are by node, or by kind and number."""
    total: Tensor | None = None
    for (key, positions), c in value.terms.items():
        x = atoms[key] if isinstance(key, Node) else atoms[_place(key)]
        x = x if positions is None else x[positions.idx.to(device)]
        if isinstance(c, Tensor):
            x = x * c.to(device, dtype)
        elif c != 1:
            x = x * c
        total = x if total is None else total + x
    const = value.const
    if total is None:
        return _constant(const, value.numel, dtype, device)
    if isinstance(const, Tensor):
        return total + const.to(device, dtype)
    return total + const if const != 0 else total


def _place(atom: Any) -> Any:
    return (atom.kind, atom.index, atom.output) if atom.kind == "o" else (atom.kind, atom.index)
