"""Networks made by a function that is known by its name, "package.module:make"."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["Factory", "in_words", "make"]

Factory = nn.Module | Callable[[], nn.Module] | str


def make(model: Factory, name: str = "model") -> nn.Module:
    """Returns the network that a network, a function without arguments, or the name of such a function stands for.

    A name is that of a module and, after a colon, of what to call in it, such as "package.module:make" or
    "networks:Net". Modules of the current folder are found too, as by ``python -m``.

    Args:
        name: the argument that ``model`` came in, for messages.

    Raises:
        ValueError: for a name of nothing that can be imported and makes an ``nn.Module``.
        TypeError: for anything else that does not.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str):
        with _current_folder_first():
            return _made(_named(model, name), name, model, ValueError)
    return _made(model, name, model, TypeError)


def in_words(model: Factory) -> str:
    """Returns the words that stand for a network or a function that makes one in a message."""
    if isinstance(model, str):
        return repr(model)
    return f"a {type(model).__name__}" if isinstance(model, nn.Module) else getattr(model, "__qualname__", repr(model))


def _made(function: Any, name: str, given: Any, error: type[Exception]) -> nn.Module:
    """Calls a function that makes a network."""
    if isinstance(function, nn.Module) or not callable(function):
        raise error(f"{name} must be a function that makes a network, got {type(function).__name__} from {given!r}")
    try:
        inspect.signature(function).bind()
    except TypeError as missing:
        raise error(f"{name} must be callable without arguments, got {given!r}: {missing}") from missing
    except ValueError:  # it has no signature that Python can read
        pass
    made: Any = function()
    if not isinstance(made, nn.Module):
        raise error(f"{name} must make an nn.Module, got {type(made).__name__} from {given!r}")
    return made


def _named(path: str, name: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute or module.startswith("."):
        raise ValueError(f"{name} must be 'package.module:function', got {path!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} names {path!r}, which cannot be imported: {error}") from error
    return found


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Lets modules be imported from the current folder, also by the function that makes the network."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(here)
