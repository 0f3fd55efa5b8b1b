"""What a network computes with beside its arguments, so that what was derived from it is not used when that changes."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "fingerprint"]

_VALUES = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device, torch.layout)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What else nn.Module keeps in itself: weights and children, which are looked at apart, and what no forward reads.
_OF_MODULES = frozenset(vars(nn.Module()))
# Objects and functions of these are taken for what they are: nothing is looked for inside.
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "triton", "numpy"}
_DEPTH = 8  # of objects inside of objects, other than modules
_LENGTH = 1000  # of a container that is looked through


@dataclass(frozen=True)
class Fingerprint:
    """A network at one moment. Equal parts mean that nothing has changed, as far as Python can see."""

    structure: tuple[Any, ...]
    """Its modules and their modes, hooks, attributes, and the shapes and dtypes of their weights."""

    places: tuple[Any, ...]
    """Where its weights, and the tensors in its attributes, lie."""

    versions: tuple[Any, ...]
    """Which tensors its attributes are, and how often they have been written to. Weights are expected to be."""

    def differences(self, other: Fingerprint) -> frozenset[int]:
        """Where in the structure another one of the same length differs."""
        pairs = zip(self.structure, other.structure, strict=False)
        return frozenset(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)

    def is_run_as(self, other: Fingerprint, besides: frozenset[int] = frozenset()) -> bool:
        """Whether work recorded of the other one is work of this one: tensors are read where they are.

        Args:
            besides: where the structure may differ.
        """
        if self.places != other.places or len(self.structure) != len(other.structure):
            return False
        return self.structure == other.structure or self.differences(other) <= besides

    def is_copied_as(self, other: Fingerprint) -> bool:
        """Whether a copy of the other one is a copy of this one, but for the weights."""
        return (self.structure, self.versions) == (other.structure, other.versions)


def fingerprint(model: Any) -> Fingerprint:
    """Looks through a module or another callable.

    Seen are attributes, closures, default arguments and the globals that a function names, through containers and
    plain objects. Not seen are the globals that the methods of a class name, and what an extension module keeps.
    """
    look = _Look()
    look.at(model, _DEPTH)
    return Fingerprint(tuple(look.structure), tuple(look.places), tuple(look.versions))


class _Same:
    """Equal for one and the same object alone, which it does not keep alive."""

    __slots__ = ("_id", "_reference")

    def __init__(self, value: object) -> None:
        self._id = id(value)
        try:
            self._reference: Any = weakref.ref(value)
        except TypeError:
            self._reference = lambda: _Same  # such a one cannot be seen to have gone

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._id == other._id and self._reference() is other._reference()

    __hash__ = None  # type: ignore[assignment]


class _Look:
    """One look through a network, each object once."""

    def __init__(self) -> None:
        self.structure: list[Any] = []
        self.places: list[Any] = []
        self.versions: list[Any] = []
        self._seen: dict[int, int] = {}

    def at(self, value: Any, depth: int, is_weight: bool = False) -> None:
        if isinstance(value, _VALUES):
            self.structure.append((type(value), repr(value) if value != value else value))  # NaN is not equal to itself
            return
        if id(value) in self._seen:
            self.structure.append(self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        if isinstance(value, nn.Module):
            self._at_module(value)
        elif isinstance(value, Tensor):
            self._at_tensor(value, is_weight)
        elif depth:
            self._at_object(value, depth - 1)

    def _at_module(self, module: nn.Module) -> None:
        own = vars(module)
        self.structure += [_Same(module), type(module), module.training]
        for weights in (own["_parameters"], own["_buffers"]):
            for name, tensor in list(weights.items()):
                self.structure.append(name)
                self.at(tensor, 0, is_weight=True)
        for hooks in _HOOKS:
            self._at_items(own[hooks], _DEPTH)
        self._at_items({name: value for name, value in list(own.items()) if name not in _OF_MODULES}, _DEPTH)
        self._at_items(own["_modules"], _DEPTH)

    def _at_tensor(self, tensor: Tensor, is_weight: bool) -> None:
        self.structure.append((tuple(tensor.shape), tensor.dtype))
        self.places.append(_place(tensor))
        if not is_weight:
            self.versions.append((_Same(tensor), None if tensor.is_inference() else tensor._version))

    def _at_object(self, value: Any, depth: int) -> None:
        if isinstance(value, types.MethodType):
            self.at(value.__self__, depth)
            self.at(value.__func__, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.at(part, depth)
        elif isinstance(value, types.FunctionType):
            self.structure.append(_Same(value.__code__))
            if not _is_of_library(value):
                self._at_items(dict(_variables(value)), depth)
        elif isinstance(value, (list, tuple, Mapping, Set)) and len(value) <= _LENGTH:
            self.structure.append((type(value), len(value)))
            if isinstance(value, Mapping):
                self._at_items(value, depth)
            else:
                for part in list(value):
                    self.at(part, depth)
        else:
            self.structure.append(_Same(value))
            if not isinstance(value, (type, types.ModuleType)) and (
                isinstance(value, types.SimpleNamespace) or not _is_of_library(type(value))
            ):
                self._at_items(getattr(value, "__dict__", {}), depth)

    def _at_items(self, items: Mapping[Any, Any], depth: int) -> None:
        for name, value in list(items.items()):
            self.structure.append(name if isinstance(name, _VALUES) else _Same(name))
            self.at(value, depth)


def _place(tensor: Tensor) -> Any:
    """Where a tensor lies; of one without memory of its own kind, such as a sparse one, which it is."""
    try:
        return tensor.data_ptr(), tensor.stride(), tensor.device
    except (RuntimeError, NotImplementedError):
        return _Same(tensor)


def _is_of_library(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _LIBRARIES


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads beside its arguments: its closure, its defaults, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "__defaults__", function.__defaults__
    yield "__kwdefaults__", function.__kwdefaults__
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield f"global {name}", function.__globals__[name]


def _names(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
