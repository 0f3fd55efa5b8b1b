"""What a network computes with besides its arguments, to detect changes that make copies and captures of it stale."""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import sys
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["LIBRARIES", "OF_MODULES", "Fingerprint", "Look", "Same", "fingerprint", "joined", "modules_of", "names_of"]

# Exactly these types, not their subclasses, which may define their own comparison.
_VALUES = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format})
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_MAPPINGS = (dict, types.MappingProxyType)
_CHANGEABLE = (bool, int, float, complex, str, Tensor, *_CONTAINERS, *_MAPPINGS)
_BOUND = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# The attributes of every nn.Module: weights and children, which are read separately, and others that no forward reads.
OF_MODULES = frozenset(vars(nn.Module()))
# Objects and functions of these libraries are compared by identity and not searched, except for the plain containers.
LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "triton", "numpy"}
_CONSTANT = "fastsde.tracing."  # whose objects that a network may hold, how a loop calls it, never change
_PLAIN = (types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList, collections.ChainMap)
_DEPTH = 8  # of nested objects other than modules
_LENGTH = 1000  # of a container or an array whose contents are read


@dataclass(frozen=True)
class Fingerprint:
    """The state of a network at one moment. If two are equal, nothing has changed, as far as Python can see."""

    structure: tuple[Any, ...]
    """Its modules and their modes, hooks, attributes, and the shapes and dtypes of their weights."""

    places: tuple[Any, ...]
    """Where its weights and the tensors in its attributes are in memory."""

    versions: tuple[Any, ...]
    """The tensors in its attributes, and how often each was written to. Weights are left out: they may change."""

    is_whole: bool = True
    """Whether all of the network could be read. If not, the fingerprint matches no other one, nor itself."""

    def differences(self, other: Fingerprint) -> frozenset[int]:
        """Returns the indices at which the structure of another fingerprint, of the same length, differs."""
        pairs = zip(self.structure, other.structure, strict=False)
        return frozenset(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)

    def is_run_as(self, other: Fingerprint, besides: frozenset[int] = frozenset()) -> bool:
        """Returns whether work recorded with the other network is valid for this one: tensors are read in place.

        Args:
            besides: the indices at which the structure may differ.
        """
        if not (self.is_whole and other.is_whole):
            return False
        if self.places != other.places or len(self.structure) != len(other.structure):
            return False
        return self.structure == other.structure or self.differences(other) <= besides

    def is_unchanged_in(self, other: Fingerprint) -> bool:
        """Returns whether nothing but weights has changed, nor tensors in attributes been written to or replaced."""
        return self.is_run_as(other) and self.versions == other.versions

    def is_copied_as(self, other: Fingerprint) -> bool:
        """Returns whether a copy of the other network is a copy of this one, except for the weights."""
        if not (self.is_whole and other.is_whole):
            return False
        return (self.structure, self.versions) == (other.structure, other.versions)


def fingerprint(model: Any, reads_classes: bool = False) -> Fingerprint:
    """Reads a module or another callable. It never raises: see `Fingerprint.is_whole`.

    It covers attributes and slots, closures, default arguments and the globals that a function names, through
    containers and plain objects; for TorchScript, weights, modes and the attributes that its code reads. It does not
    cover the state of extension modules, and what is in a container of more than 1,000 entries or nested in more than 8
    objects.

    Args:
        reads_classes: whether the attributes of modules' classes and the globals that their methods name are covered,
            too, where they are numbers, strings, tensors or containers. That takes long for a network of many classes.
    """
    look = Look()
    look.reads_classes = reads_classes
    look.at(model, _DEPTH)
    return Fingerprint(tuple(look.structure), tuple(look.places), tuple(look.versions), look.is_whole)


def joined(prints: Sequence[Fingerprint]) -> Fingerprint:
    """Returns the fingerprint of several networks together."""
    first, *others = prints
    for each in others:
        first = Fingerprint(
            first.structure + each.structure,
            first.places + each.places,
            first.versions + each.versions,
            first.is_whole and each.is_whole,
        )
    return first


def modules_of(model: Any) -> list[nn.Module]:
    """Returns the network itself if it is a module, or else all modules that the function or object holds."""
    if isinstance(model, nn.Module):
        return [model]
    look = Look()
    look.at(model, _DEPTH)
    return look.modules


class Same:
    """Equal only for the same object, which it does not keep alive."""

    __slots__ = ("_id", "_reference", "is_sure")

    def __init__(self, value: object) -> None:
        self._id = id(value)
        self.is_sure = True  # whether the end of the object would be noticed
        try:
            self._reference: Any = weakref.ref(value)
        except TypeError:
            self.is_sure = not gc.is_tracked(value)  # an object that refers to no other may be kept alive
            self._reference = (lambda: value) if self.is_sure else (lambda: Same)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._id == other._id and self._reference() is other._reference()

    __hash__ = None  # type: ignore[assignment]


class Look:
    """One pass through a network, which reads each object once."""

    DEPTH = _DEPTH
    LENGTH = _LENGTH

    def __init__(self) -> None:
        self.structure: list[Any] = []
        self.places: list[Any] = []
        self.versions: list[Any] = []
        self.modules: list[nn.Module] = []
        self.is_whole = True
        self.reads_classes = False
        self._kinds: set[type] = set()
        self._seen: dict[int, tuple[int, object]] = {}  # kept alive, so that no id is reused

    def at(self, value: Any, depth: int, is_weight: bool = False) -> None:
        try:
            if type(value) in _VALUES:
                self.structure.append((type(value), value))
            elif type(value) in (float, complex):
                self.structure.append((type(value), repr(value)))  # NaN is not equal to itself, and 0.0 equals -0.0
            elif id(value) in self._seen:
                self.structure.append(self._seen[id(value)][0])
            else:
                self._seen[id(value)] = len(self._seen), value
                self._at_object(value, depth, is_weight)
        except Exception:  # an object's own code may raise anything
            self.is_whole = False

    def _at_object(self, value: Any, depth: int, is_weight: bool) -> None:
        if isinstance(value, nn.Module):
            self.modules.append(value)
        if isinstance(value, torch.jit.ScriptModule):
            self._at_script(value)
        elif isinstance(value, nn.Module):
            self._at_module(value)
        elif isinstance(value, Tensor):
            self._at_tensor(value, is_weight)
        elif isinstance(value, (np.generic, np.ndarray)):
            self._at_array(value)
        elif not depth:
            self.structure.append(Same(value))
        elif isinstance(value, types.FunctionType):
            self._at_function(value, depth - 1)
        elif isinstance(value, weakref.ReferenceType):
            self.at(value(), depth - 1)
        elif isinstance(value, _BOUND):
            self.at(value.__self__, depth - 1)
            self.at(getattr(value, "__func__", value.__name__), depth - 1)
        elif isinstance(value, (*_CONTAINERS, *_MAPPINGS)):
            self._at_container(value, depth - 1)
        else:
            self._at_other(value, depth - 1)

    def _at_module(self, module: nn.Module) -> None:
        own = vars(module)
        self.structure += [Same(module), Same(type(module)), module.training]
        if self.reads_classes and type(module) not in self._kinds:
            self._at_class(type(module))
        for weights in (own["_parameters"], own["_buffers"]):
            for name, tensor in list(weights.items()):
                self.structure.append(name)
                self.at(tensor, 0, is_weight=True)
        for hooks in _HOOKS:
            self._at_items(own[hooks], _DEPTH)
        self._at_items({name: value for name, value in list(own.items()) if name not in OF_MODULES}, _DEPTH)
        self._at_items(own["_modules"], _DEPTH)
        self._at_slots(module, _DEPTH)

    def _at_class(self, kind: type) -> None:
        self._kinds.add(kind)
        for base in kind.__mro__:
            if _is_of_library(base) or base is object:
                continue
            for name, value in list(vars(base).items()):
                function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                if isinstance(function, types.FunctionType):
                    for read in names_of(function.__code__):
                        if isinstance(function.__globals__.get(read), _CHANGEABLE):
                            self.structure.append(read)
                            self.at(function.__globals__[read], _DEPTH)
                elif isinstance(value, _CHANGEABLE) and not name.startswith("__"):
                    self.structure.append(name)
                    self.at(value, _DEPTH)

    def _at_script(self, script: Any) -> None:
        """Reads a scripted, traced or frozen module, which keeps its weights and attributes in C++."""
        self.structure.append(Same(script))
        for name, tensor in (*script.named_parameters(), *script.named_buffers()):
            self.structure.append(name)
            self.at(tensor, 0, is_weight=True)
        graph = script.inlined_graph
        if graph.findNode("prim::CallMethod") is not None:
            raise NotImplementedError("a module behind an interface, whose code is not known")
        read = sorted({node.s("name") for node in graph.findAllNodes("prim::GetAttr")})
        for path, module in script.named_modules():
            self.structure += [path, getattr(module, "training", None)]  # a frozen script has no mode
            found = {name: getattr(module, name) for name in read if hasattr(module, name)}
            self._at_items({name: value for name, value in found.items() if not isinstance(value, nn.Module)}, _DEPTH)
        for hooks in _HOOKS:
            self._at_items(getattr(script, hooks), _DEPTH)

    def _at_tensor(self, tensor: Tensor, is_weight: bool) -> None:
        if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
            raise NotImplementedError("a tensor of several tensors")
        self.structure.append((tuple(tensor.shape), tensor.dtype))
        self.places.append((tensor.data_ptr(), tensor.stride(), tensor.device))
        if not is_weight:
            self.versions.append((Same(tensor), None if tensor.is_inference() else tensor._version))
        self._at_attributes(tensor, _DEPTH)

    def _at_array(self, array: np.generic | np.ndarray[Any, Any]) -> None:
        self.structure += [Same(type(array)), array.shape, array.dtype.str]
        if isinstance(array, np.ndarray):
            self.structure.append(Same(array))
        if array.size <= self.LENGTH and not array.dtype.hasobject:
            self.structure.append(array.tobytes())
        self._at_attributes(array, _DEPTH)

    def _at_function(self, function: types.FunctionType, depth: int) -> None:
        self.structure.append(Same(function.__code__))
        if not _is_of_library(function):
            self._at_items(dict(_variables(function)), depth)
            self._at_items(vars(function), depth)

    def _at_container(self, value: Any, depth: int) -> None:
        """Reads a container by the methods of Python's own type, since a subclass may override them."""
        kind: Any = next(kind for kind in (*_CONTAINERS, *_MAPPINGS) if isinstance(value, kind))
        self.structure += [Same(type(value)), kind.__len__(value)]
        if kind.__len__(value) > self.LENGTH:
            self.structure.append(Same(value))
        elif kind in _MAPPINGS:
            self._at_items(value if kind is not dict else dict(dict.items(value)), depth)
        else:
            for part in list(kind.__iter__(value)):
                self.at(part, depth)
        self._at_attributes(value, depth)

    def _at_other(self, value: Any, depth: int) -> None:
        if isinstance(value, (torch._C.ScriptMethod, torch._C.ScriptModule)):
            raise NotImplementedError("a method of a script, whose weights are not known")
        same = Same(value)
        self.structure.append(same)
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.at(part, depth)
        if not isinstance(value, (type, types.ModuleType)):
            self._at_attributes(value, depth)
            if not same.is_sure:  # another object may have taken its place: read it as pickle would
                self.at(value.__reduce_ex__(2), depth)

    def _at_attributes(self, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN) or not _is_of_library(type(value)):
            self._at_items(getattr(value, "__dict__", {}), depth)
            self._at_slots(value, depth)

    def _at_slots(self, value: Any, depth: int) -> None:
        for own in (vars(kind) for kind in type(value).__mro__ if "__slots__" in vars(kind)):
            slots = {name: slot for name, slot in own.items() if isinstance(slot, types.MemberDescriptorType)}
            filled = {name: slot.__get__(value) for name, slot in slots.items() if hasattr(value, name)}
            self._at_items(filled, depth)

    def _at_items(self, items: Mapping[Any, Any], depth: int) -> None:
        for name, value in list(items.items()):
            self.at(name, depth)
            self.at(value, depth)


def _is_of_library(value: Any) -> bool:
    module = str(getattr(value, "__module__", ""))
    return module.partition(".")[0] in LIBRARIES or module.startswith(_CONSTANT)


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields what a function reads besides its arguments: its closure, its defaults, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "__defaults__", function.__defaults__
    yield "__kwdefaults__", function.__kwdefaults__
    for name in sorted(names_of(function.__code__)):
        if name in function.__globals__:
            yield f"global {name}", function.__globals__[name]


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> set[str]:
    """Returns the names of globals and attributes in a function's code."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(names_of, inner))
