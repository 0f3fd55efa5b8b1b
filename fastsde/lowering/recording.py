"""The operations of one call of a network, and what each of its tensors depends on."""

from __future__ import annotations

import contextlib
import enum
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..dynamo import Uncompiled

__all__ = ["Needs", "NotLowered", "Operation", "Recorder", "Value", "replay"]


class NotLowered(Exception):  # noqa: N818 (it then runs row by row)
    """The network is no program; the message says why.

    Args:
        module: the innermost module whose operation that is, if known.
    """

    def __init__(self, reason: str, module: nn.Module | None = None) -> None:
        super().__init__(reason)
        self.module = module


class Needs(enum.IntFlag):
    """What a tensor depends on, besides the weights."""

    NOTHING = 0
    TIME = 1
    CONDITION = 2
    STATE = 4

    @property
    def is_ahead(self) -> bool:
        """Whether it can be computed before the first row: it does not follow the state, nor row and sample at once."""
        return self in (Needs.NOTHING, Needs.TIME, Needs.CONDITION)


@dataclass(eq=False)
class Value:
    """A tensor of the recorded call.

    Args:
        storage: a name of its memory.
        is_leaf: whether no recorded operation has made it.
        is_stale: whether it has been changed through another tensor.
        recorded: a copy, if Python code has read it.
    """

    number: int
    tensor: Tensor
    needs: Needs
    storage: int
    is_leaf: bool = False
    is_stale: bool = False
    recorded: Tensor | None = None


@dataclass(eq=False)
class Operation:
    """An operation: its function and arguments, with a `Value` for each tensor, and its results.

    Args:
        writes: the storages that it writes to.
        module: the innermost module that called it.
    """

    number: int
    function: Any
    leaves: list[Any]
    spec: Any
    outputs: list[Value | None]
    writes: tuple[int, ...] = ()
    module: nn.Module | None = None
    needs: Needs = Needs.NOTHING

    @property
    def name(self) -> str:
        """The name of the operation, without that it works in place."""
        name = str(self.function._schema.name).partition("::")[2]
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name

    @property
    def inputs(self) -> list[Value]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Value)]

    def arguments(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Returns the arguments, with values for tensors."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs


_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_unique2", "unique_dim", "masked_select")


class Recorder(Uncompiled, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that run under it. Tensors that it has not seen are constants.

    Args:
        batch: of the recorded call.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.operations: list[Operation] = []
        self.values: list[Value] = []
        self.read: list[Value] = []  # constants whose numbers Python has read
        self._of_tensor: dict[int, Value] = {}
        self._needs: dict[int, Needs] = {}
        self._written: dict[int, int] = {}  # the last operation that writes to a storage
        self._used: list[tuple[int, int]] = []  # (the operation before which the program reads it, storage)

    def recording(self) -> contextlib.ExitStack:
        """Records the call of a network in this context, also what Python code reads of its tensors."""
        stack = contextlib.ExitStack()
        stack.enter_context(_HostReads(self))
        stack.enter_context(self)
        return stack

    def argument(self, tensor: Tensor, needs: Needs) -> Value:
        """Names an argument of the call."""
        return self._add(tensor, needs, is_leaf=True)

    def value_of(self, tensor: Tensor) -> Value:
        """Returns the value of a tensor, which is a constant if it is not known."""
        found = self._of_tensor.get(id(tensor))
        return self._add(tensor, Needs.NOTHING, is_leaf=True) if found is None else found

    def needs(self, value: Value) -> Needs:
        """Returns what a value depends on, through all that is written to its memory."""
        return value.needs | self._needs[value.storage]

    def uses(self, operation: Operation | None, value: Value) -> None:
        """Notes that the program reads a value where an operation stands, by default at the end."""
        number = len(self.operations) if operation is None else operation.number
        self._used.append((number, value.storage))

    def check_uses(self) -> None:
        """Raises `NotLowered` if something that the program reads is written to later, or something that an operation
        of another kind reads: operations are run again kind by kind.
        """
        for operation in self.operations:
            for value in operation.inputs:
                writer = self._written.get(value.storage, -1)
                if writer > operation.number and self.operations[writer].needs != operation.needs:
                    raise NotLowered("it writes in place to what it has read before")
        for number, storage in self._used:
            if self._written.get(storage, -1) > number:
                raise NotLowered("it writes in place to what it has read before")

    def settle(self) -> None:
        """Finds what each operation depends on: also on what is written to its memory, before or after it."""
        changes = True
        while changes:
            changes = False
            for operation in self.operations:
                touched = [value for value in (*operation.inputs, *operation.outputs) if value is not None]
                own = Needs.NOTHING
                for each in touched:
                    own |= self.needs(each)
                if own != operation.needs:
                    operation.needs, changes = own, True
                for value in operation.outputs if own.is_ahead else ():
                    if value is not None and self._needs[value.storage] | own != self._needs[value.storage]:
                        self._needs[value.storage] |= own
                        changes = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        module = _module()
        known = [self.value_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in known if isinstance(leaf, Value)]
        needs = Needs.NOTHING
        for value in inputs:
            needs |= self.needs(value)
        name = str(function._schema.name).partition("::")[2]
        if torch.Tag.nondeterministic_seeded in function.tags and _draws(function, args, kwargs or {}):
            raise NotLowered(f"{name} draws random numbers", module)
        if name in _READS and needs:
            raise NotLowered(f"Python code reads {_said(needs)} ({name})", module)
        if any(value.is_stale for value in inputs):
            raise NotLowered("it reads what it has changed in place through another tensor", module)
        found = function(*args, **(kwargs or {}))
        if name in _READS:
            self.read += inputs
        results, _ = tree_flatten(found)
        written = self._written_by(function, args, kwargs or {})
        operation = Operation(len(self.operations), function, known, spec, [], module=module)
        if written:
            self._write(operation, written, needs, name, module)
        for result in results:
            if not isinstance(result, Tensor):
                operation.outputs.append(None)
            elif written and any(result is tensor for tensor in written) and needs.is_ahead:
                operation.outputs.append(self.value_of(result))
            else:
                operation.outputs.append(self._add(result, needs))
        self.operations.append(operation)
        return found

    def _add(self, tensor: Tensor, needs: Needs, is_leaf: bool = False) -> Value:
        storage = tensor.untyped_storage()._cdata
        value = Value(len(self.values), tensor, needs, storage, is_leaf)
        self.values.append(value)
        self._of_tensor[id(tensor)] = value
        self._needs.setdefault(storage, Needs.NOTHING)
        return value

    @staticmethod
    def _written_by(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        schema = function._schema
        if not schema.is_mutable:
            return []
        given = [args[i] if i < len(args) else kwargs.get(each.name) for i, each in enumerate(schema.arguments)]
        return [
            each
            for each, argument in zip(given, schema.arguments, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(each, Tensor)
        ]

    def _write(
        self, operation: Operation, written: list[Tensor], needs: Needs, name: str, module: nn.Module | None
    ) -> None:
        for tensor in written:
            value = self.value_of(tensor)
            if value.is_leaf:
                raise NotLowered(f"it changes a weight or an argument in place ({name})", module)
            operation.writes += (value.storage,)
            self._written[value.storage] = operation.number
            if needs.is_ahead:
                self._needs[value.storage] |= needs
                continue
            if not name.endswith("_") or self.needs(value).is_ahead:
                raise NotLowered(f"it writes the state into memory made before ({name}): use torch.cat", module)
            for other in self.values:
                if other.storage == value.storage and other is not value:
                    other.is_stale = True


class _HostReads(TorchFunctionMode):
    """Notes what Python code reads by methods that run no operation."""

    _METHODS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage)

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self._METHODS and args and isinstance(args[0], Tensor):
            value = self._recorder.value_of(args[0])
            needs = self._recorder.needs(value)
            if needs:
                raise NotLowered(f"Python code reads {_said(needs)} ({function.__name__})", _module())
            self._recorder.read.append(value)
        return function(*args, **(kwargs or {}))


def _draws(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether an operation that may draw random numbers does: attention does not without dropout."""
    names = [argument.name for argument in function._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    default = function._schema.arguments[place].default_value
    return bool(args[place] if place < len(args) else kwargs.get("dropout_p", default))


def _said(needs: Needs) -> str:
    names = {Needs.TIME: "the time", Needs.CONDITION: "a condition", Needs.STATE: "the state"}
    return " and ".join(text for need, text in names.items() if need in needs)


def _module() -> nn.Module | None:
    """Returns the innermost module on Python's stack."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Does what ``to.copy_(source)`` does, by operations that vmap has."""
    source = source.to(to.dtype, copy=True)  # it may be the same memory
    return to.zero_().add_(source)


def replay(operations: Iterable[Operation], env: dict[int, Any]) -> None:
    """Runs operations again.

    Args:
        env: tensors by the number of their value; the results are added. A value that it lacks is a constant.
    """
    for operation in operations:
        given = [env.get(leaf.number, leaf.tensor) if isinstance(leaf, Value) else leaf for leaf in operation.leaves]
        args, kwargs = tree_unflatten(given, operation.spec)
        function: Callable[..., Any] = operation.function
        if operation.function is torch.ops.aten.copy_.default:
            function = _copy
        results, _ = tree_flatten(function(*args, **kwargs))
        for value, result in zip(operation.outputs, results, strict=True):
            if value is not None:
                env[value.number] = result
