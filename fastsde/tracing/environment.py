"""What a loop reads besides its arguments: globals, closures, classes and attributes, to notice their changes."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engines.fingerprint import LIBRARIES, OF_MODULES, Fingerprint, Look, Same, names_of
from .probe import Probe
from .tape import cdata

__all__ = ["TRACED", "Environment", "environment", "modules_in"]

TRACED = "a state of a trace"
_ELEMENTS = 100_000  # of a tensor that is compared by its contents
_MODULES = 64  # of a network whose attributes are read


class Environment(NamedTuple):
    """What was read, and the generators among it."""

    fingerprint: Fingerprint
    generators: list[torch.Generator]

    @property
    def keeps_states(self) -> bool:
        """Whether something holds a state of a trace."""
        return any(isinstance(each, tuple) and each[-1:] == (TRACED,) for each in self.fingerprint.structure)


def modules_in(network: nn.Module) -> list[nn.Module]:
    """Returns a module and all modules in it; faster than `nn.Module.modules`, which names them."""
    found, seen = [network], {id(network)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


@functools.cache
def _is_users(module: str) -> bool:
    """Returns whether a module is the user's own: neither installed nor of Python or this package."""
    if module.partition(".")[0] in LIBRARIES | {"fastsde"}:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or "site-packages" not in file


class _Look(Look):
    """Reads small tensors by their contents, and of the user's own modules and classes what the loop may use.

    Of the networks, which are called in every row, it reads attributes and no weights.
    """

    LENGTH = 20_000

    def __init__(self, networks: Iterable[Any], given: Collection[int]) -> None:
        super().__init__()
        self.generators: list[torch.Generator] = []
        self._given = given
        self._classes: set[int] = set()  # that are read, by id
        self._networks: dict[int, bool] = {}  # by id: whether attributes are read
        self._read: list[Any] = []
        for network in networks:
            modules = modules_in(network) if isinstance(network, nn.Module) else [network]
            for module in modules:
                kind = type(module)
                of_torch = kind.__module__.startswith("torch.") and kind is not nn.Module
                is_read = not of_torch and (module is network or len(modules) <= _MODULES)
                self._networks[id(module)] = is_read
                if is_read:
                    self._read.append(module)

    def at_networks(self) -> None:
        """Reads the networks and those of their modules that are not PyTorch's."""
        for module in self._read:
            self.at(module, self.DEPTH)

    def at(self, value: Any, depth: int, is_weight: bool = False) -> None:
        if id(value) in self._networks:
            self.structure.append(id(value))
            if id(value) not in self._seen and self._networks[id(value)]:
                self._seen[id(value)] = len(self._seen), value
                attributes = getattr(value, "__dict__", {})
                self._at_items({name: x for name, x in attributes.items() if name not in OF_MODULES}, 2)
        elif isinstance(value, torch.Generator):
            self.generators.append(value)
            self.structure.append("given generator" if cdata(value) in self._given else Same(value))
        else:
            super().at(value, depth, is_weight)

    def _at_tensor(self, tensor: Tensor, is_weight: bool) -> None:
        contents: Any
        if isinstance(tensor, Probe):
            contents = TRACED
        elif tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
            raise NotImplementedError("a tensor of several tensors")
        elif tensor.device.type == "cpu" and tensor.numel() <= _ELEMENTS:
            contents = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            contents = Same(tensor), None if tensor.is_inference() else tensor._version, tensor.data_ptr()
        self.structure.append((tuple(tensor.shape), tensor.dtype, tensor.device, contents))

    def _at_function(self, function: types.FunctionType, depth: int) -> None:
        super()._at_function(function, depth)
        if depth < 1 or not _is_users(str(function.__module__)):
            return
        names = names_of(function.__code__)
        for name in sorted(names):
            module = function.__globals__.get(name)
            if isinstance(module, types.ModuleType) and _is_users(module.__name__):
                self._at_items({each: vars(module)[each] for each in sorted(names) if each in vars(module)}, depth - 1)

    def _at_other(self, value: Any, depth: int) -> None:
        super()._at_other(value, depth)
        kind = value if isinstance(value, type) else type(value)
        for each in kind.__mro__ if depth > 0 else ():
            if _is_users(str(each.__module__)) and id(each) not in self._classes:
                self._classes.add(id(each))
                self._at_items({name: _inner(x) for name, x in vars(each).items() if name not in _NOT_READ}, depth - 1)


_NOT_READ = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate_func__"}


def _inner(value: Any) -> Any:
    """Returns the function in a method's wrapper."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def environment(
    loop: Callable[..., Any], objects: Sequence[Any], networks: Sequence[Any], given: Collection[int] = ()
) -> Environment:
    """Reads a loop and objects that it is given. The fingerprints of two moments are equal if nothing has changed.

    Args:
        given: generators that are arguments, by their `cdata`: other ones may come in their place.
    """
    look = _Look(networks, given)
    look.at(loop, look.DEPTH)
    for each in objects:
        look.at(each, look.DEPTH)
    look.at_networks()
    found = Fingerprint(tuple(look.structure), tuple(look.places), tuple(look.versions), look.is_whole)
    return Environment(found, look.generators)
