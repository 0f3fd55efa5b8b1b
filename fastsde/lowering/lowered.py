"""A network becomes a program (`fastsde.lowering.program`), and the numbers that the program reads.

All samples of a row share its time. So a network's call is cut by what each tensor depends on: what follows from the
weights alone, from the time alone, or from a sample's conditions alone, is computed by PyTorch before the first row,
for all rows at once; what follows the state is the program. The call is recorded once, as PyTorch's own operations, so
that it does not matter how the network is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..comparison import is_near, largest
from .builder import Builder
from .program import Program, Vectors, evaluate
from .recording import Needs, NotLowered, Operation, Recorder, Value, replay
from .rules import lower_operation
from .trained import Source, check_disjoint

__all__ = ["Lowered", "described", "is_shared", "lower"]

_BATCHES = (3, 5, 7, 11, 13, 17, 19)
_ELEMENTS = 1 << 24  # of all tensors that are computed for a chunk of rows


@dataclass(frozen=True)
class _Argument:
    """A tensor among the conditions: its place among their leaves, and whether all samples have the same."""

    place: int
    value: Value
    is_shared: bool


class Lowered:
    """A lowered network.

    Attributes:
        program: the program.
        is_checked: whether it was compared with the network. A network whose output is zero, such as one whose last
            layer starts as zeros, hides any difference: it is to be lowered again once its weights have changed.
    """

    def __init__(self, recorder: Recorder, builder: Builder, program: Program, time: Value, arguments: Any) -> None:
        self.program, self.is_checked = program, False
        self._batch, self._time = recorder.batch, time
        self._arguments: list[_Argument] = arguments
        self._matrices, self._constants = builder.matrices, builder.constants
        # The parameters that have gradients by their storage, and the storages of what is computed from them.
        self._trained = {
            value.storage: value.tensor for value in recorder.values if value.is_leaf and value.tensor.requires_grad
        }
        self._made_of = _made_of(set(self._trained), recorder)
        read = {value.number for operation in recorder.operations for value in operation.inputs}
        self._stops = any(_stops_gradients(operation, read) for operation in recorder.operations)
        self._rows, self._given, self._read = builder.rows, builder.given, recorder.read
        wanted = [*self._matrices, *self._constants, *self._rows, *self._given, *self._read]
        ahead = _needed([each for each in recorder.operations if each.needs.is_ahead], wanted)
        self._of = {
            needs: [each for each in ahead if each.needs == needs]
            for needs in (Needs.NOTHING, Needs.TIME, Needs.CONDITION)
        }
        self._leaves = self._weights(recorder)
        self._held: list[Tensor] | None = None  # the weights of the last call, to see changes
        self._constants_now: dict[int, Any] = {}
        self._times: Tensor | None = None
        self._rows_now: Tensor | None = None

    def _weights(self, recorder: Recorder) -> list[Value]:
        """Returns the constants that numbers are computed from; what is only looked at needs no comparison."""
        read = {value.storage for value in self._read}
        for operation in (each for operations in self._of.values() for each in operations):
            if not _is_view(operation):
                read |= {value.storage for value in operation.inputs}
        return [value for value in recorder.values if value.is_leaf and value.storage in read]

    def vectors(self, times: Tensor, n: int, conditions: Sequence[Any]) -> Vectors | None:
        """Returns the numbers that the program reads, at the network's present weights.

        Args:
            times: fp32 ``[K]``.
            n: the number of samples.
            conditions: the arguments that the network is called with besides x and t, as it was lowered with.

        Returns:
            The numbers, or None if Python code in the network has read other numbers than now: then lower it again.
        """
        leaves = tree_flatten(conditions)[0] if self._arguments else []
        self._refresh([leaves[each.place] for each in self._arguments if each.is_shared])
        env = self._constants_now
        for value in self._read:
            assert value.recorded is not None
            if not torch.equal(env.get(value.number, value.tensor), value.recorded):
                return None
        if self._rows_now is None or self._times is None or not torch.equal(self._times, times):
            self._times, self._rows_now = times.clone(), self._computed(Needs.TIME, self._rows, [times], [self._time])
        own = [each for each in self._arguments if not each.is_shared]
        values = [each.value for each in own]
        given = self._computed(Needs.CONDITION, self._given, [leaves[each.place] for each in own], values)
        if not self._given:
            given = times.new_empty((n, 0))
        return Vectors(
            [env.get(each.number, each.tensor) for each in self._matrices],
            [env.get(each.number, each.tensor) for each in self._constants],
            self._rows_now,
            given,
        )

    def sources(self) -> list[Source]:
        """Returns where each matrix comes from, and then each constant.

        Raises:
            NotLowered: if one is computed from a parameter, or two read the same element of one.
        """
        if self._stops:
            raise NotLowered("it stops gradients")
        found = []
        for value in (*self._matrices, *self._constants):
            if value.storage in self._made_of:
                raise NotLowered("the weights of its layers are computed from its parameters")
            found.append(Source(value.tensor, self._trained.get(value.storage)))
        check_disjoint(found)
        return found

    def _refresh(self, shared: list[Tensor]) -> None:
        """Computes again what follows from weights and shared conditions, if any of them has changed."""
        now = [*(value.tensor for value in self._leaves), *(each[:1] for each in shared)]
        if self._held is not None and all(map(_same, self._held, now)):
            return
        self._held = [each.detach().clone() for each in now]
        env: dict[int, Any] = {}
        for each, tensor in zip((e for e in self._arguments if e.is_shared), shared, strict=True):
            env[each.value.number] = tensor[:1].expand(self._batch, *tensor.shape[1:]).contiguous()
        replay(self._of[Needs.NOTHING], env)
        self._constants_now, self._rows_now = env, None

    def _computed(
        self, needs: Needs, wanted: Sequence[Value], inputs: Sequence[Tensor], arguments: Sequence[Value]
    ) -> Tensor:
        """Returns the wanted tensors side by side, ``[len(inputs[0]), width]``, for each of the inputs' entries."""
        count = len(inputs[0]) if inputs else 0
        if not wanted or not count:
            return torch.empty((count, 0), dtype=torch.float32, device=self._time.tensor.device)
        operations = self._of[needs]

        def one(*given: Tensor) -> Tensor:
            env = dict(self._constants_now)
            for value, entry in zip(arguments, given, strict=True):
                env[value.number] = entry.expand(self._batch, *entry.shape)
            replay(operations, env)
            parts = [env[each.number] for each in wanted]
            parts = [part[0] if needs == Needs.CONDITION else part for part in parts]
            return torch.cat([part.reshape(-1).to(torch.float32) for part in parts])

        size = sum(v.tensor.numel() for operation in operations for v in operation.outputs if v is not None)
        chunk = max(1, _ELEMENTS // max(1, size))
        found = [_for_each(one, [each[at : at + chunk] for each in inputs]) for at in range(0, count, chunk)]
        return torch.cat(found) if len(found) > 1 else found[0]


def _for_each(one: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Returns the results for each entry of the inputs: all at once, or one by one where PyTorch cannot."""
    try:
        found: Tensor = torch.vmap(torch.func.functionalize(one))(*inputs)
        return found
    except Exception:  # an operation that vmap lacks may raise anything
        return torch.stack([one(*entries) for entries in zip(*inputs, strict=True)])


def _needed(operations: Sequence[Operation], wanted: Sequence[Value]) -> list[Operation]:
    """Returns the operations that some values are computed by, and those that write to the memory of any of these."""
    kept = []
    storages = {value.storage for value in wanted}
    for operation in reversed(operations):
        made = {value.storage for value in operation.outputs if value is not None} | set(operation.writes)
        if made & storages:
            kept.append(operation)
            storages |= {value.storage for value in operation.inputs}
    return kept[::-1]


def _stops_gradients(operation: Operation, read: set[int]) -> bool:
    """Returns whether no result of an operation has a gradient though an argument has: as in ``detach``.

    Args:
        read: the numbers of the values that the call reads; others are what autograd keeps for itself.
    """
    results = [
        v.tensor for v in operation.outputs if v is not None and v.number in read and v.tensor.is_floating_point()
    ]
    has_gradient = any(value.tensor.requires_grad for value in operation.inputs)
    return has_gradient and bool(results) and not any(tensor.requires_grad for tensor in results)


def _made_of(storages: set[int], recorder: Recorder) -> set[int]:
    """Returns the storages of constants that are computed from those of some others."""
    made: set[int] = set()
    for operation in recorder.operations:
        if operation.needs == Needs.NOTHING and any(v.storage in storages | made for v in operation.inputs):
            made |= {v.storage for v in operation.outputs if v is not None and v.storage not in storages}
    return made


def _is_view(operation: Operation) -> bool:
    """Returns whether an operation only looks at the memory of its first argument."""
    if operation.writes or not operation.inputs:
        return False
    storage = operation.inputs[0].storage
    return all(output is not None and output.storage == storage for output in operation.outputs)


def _same(before: Tensor, now: Tensor) -> bool:
    return before.dtype == now.dtype and before.shape == now.shape and torch.equal(before, now)


def lower(
    network: Callable[..., Tensor],
    sample_shape: Sequence[int],
    times: Tensor,
    conditions: Sequence[Any] = (),
    *,
    sizes: Sequence[int] = (),
    time_is_input: bool = False,
) -> Lowered:
    """Returns a network as a program.

    Args:
        network: called as ``network(x, t, *conditions)`` with x fp32 ``[B, *sample_shape]`` and t ``[B]``.
        times: fp32 ``[K]``, those of the table, on the network's device.
        conditions: nested dicts, tuples and lists of tensors with the batch first, and of other values.
        time_is_input: whether t is another input, the last unit of value 0, from which nothing is computed ahead: in
            training each sample has a time of its own, and the weights that it meets have gradients.
        sizes: numbers that the batch of the recorded call must not be equal to: those of the weights' shapes.

    Raises:
        NotLowered: if it cannot be one; the message says why.
    """
    leaves, spec = tree_flatten(tuple(conditions))
    taken = {*sizes, *sample_shape, *(size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape[1:])}
    batch = next((each for each in _BATCHES if each not in taken), 23)
    x, t, given = _inputs(batch, sample_shape, times[:1], leaves)
    with torch.no_grad():
        network(x.clone(), t.clone(), *tree_unflatten(given, spec))  # fills caches, and raises the network's own errors
        recorder, time_needs = Recorder(batch), Needs.STATE if time_is_input else Needs.TIME
        state, time = recorder.argument(x, Needs.STATE), recorder.argument(t, time_needs)
        arguments = []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                shared = is_shared(leaf)
                needs = Needs.NOTHING if shared else Needs.CONDITION
                arguments.append(_Argument(place, recorder.argument(given[place], needs), shared))
        with recorder.recording(), torch.set_grad_enabled(time_is_input):
            output = network(x, t, *tree_unflatten(given, spec))
        recorder.settle()
        builder = Builder(recorder, x[0].numel() + time_is_input)
        builder.start(state, time if time_is_input else None)
        result = recorder.value_of(output)
        read = {result.number, *(value.number for operation in recorder.operations for value in operation.inputs)}
        for operation in list(recorder.operations):
            # What nothing reads is what autograd keeps for itself.
            if not operation.needs.is_ahead and any(v is not None and v.number in read for v in operation.outputs):
                lower_operation(builder, operation)
        program = builder.finished(result)
        recorder.settle()
        recorder.check_uses()
        for value in recorder.read:
            value.recorded = value.tensor.clone()
        for operation in recorder.operations:
            operation.module = None  # what is kept with a module must not keep it alive
        lowered = Lowered(recorder, builder, program, time, arguments)
        _check(lowered, network, sample_shape, times, leaves, spec)
    return lowered


def is_shared(condition: Tensor) -> bool:
    """Returns whether a condition is the same for all samples."""
    return len(condition) < 2 or condition.stride(0) == 0 or torch.equal(condition[1:], condition[:-1])


def _inputs(
    batch: int, sample_shape: Sequence[int], time: Tensor, leaves: Sequence[Any], seed: int = 0
) -> tuple[Tensor, Tensor, list[Any]]:
    """Returns x, t and the conditions of a call of ``batch`` samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, *sample_shape), generator=generator, dtype=torch.float32, device="cpu").to(time.device)
    given = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0 or not len(leaf):
                raise NotLowered("it is given a condition without samples")
            leaf = leaf[torch.arange(batch, device=leaf.device) % len(leaf)].contiguous()
        given.append(leaf)
    return x, time.expand(batch).contiguous(), given


def _others(condition: Tensor, seed: int) -> Tensor:
    """Returns a condition with other numbers, which differ from sample to sample, if it has numbers."""
    if not condition.is_floating_point():
        return condition
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(condition.shape, generator=generator, dtype=torch.float32, device="cpu")
    return condition + drawn.to(condition)


def _check(
    lowered: Lowered,
    network: Callable[..., Tensor],
    sample_shape: Sequence[int],
    times: Tensor,
    leaves: Sequence[Any],
    spec: Any,
) -> None:
    """Compares the program with the network, in another batch and at other times than it was recorded with.

    Raises:
        NotLowered: if they differ by more than rounding.
    """
    batch = lowered._batch + 1
    rows = sorted({0, len(times) // 2, len(times) - 1})
    for row in rows:
        x, t, given = _inputs(batch, sample_shape, times[row : row + 1], leaves, seed=1 + row)
        for argument in lowered._arguments:
            if not argument.is_shared:
                given[argument.place] = _others(given[argument.place], seed=row)
        if lowered.program.inputs > lowered.program.dim:  # each sample has a time of its own
            t = times[torch.arange(row, row + batch, device=times.device) % len(times)]
        conditions = tree_unflatten(given, spec)
        expected = network(x.clone(), t, *conditions).reshape(batch, -1)
        vectors = lowered.vectors(times, batch, conditions)
        assert vectors is not None
        inputs = x.reshape(batch, -1)
        if lowered.program.inputs > lowered.program.dim:
            inputs = torch.cat((inputs, t[:, None]), 1)
        found = evaluate(lowered.program, vectors, inputs, row)
        lowered.is_checked |= largest(expected) > 0
        if not is_near(found, expected):
            raise NotLowered("its result depends on more than x, t, the conditions and the weights")


def described(error: NotLowered, model: Any) -> str:
    """Returns why a network is no program, with the name of the module in it."""
    if error.module is not None and isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if module is error.module:
                return f"{type(module).__name__}{f' ({name})' if name else ''}: {error}"
        return f"{type(error.module).__name__}: {error}"
    return str(error)
