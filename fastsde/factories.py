"""Networks made by a function that is known by its name, "package.module:make"."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["Factory", "make"]

Factory = nn.Module | Callable[[], nn.Module] | str


def make(model: Factory, name: str = "model") -> nn.Module:
    """Returns the network that a network, a function without arguments, or the name of such a function stands for.

    A name is that of a module and, after a colon, of what to call in it, such as "package.module:make" or
    "networks:Net". Modules of the current folder are found too, as by ``python -m``.

    Args:
        name: the argument that ``model`` came in, for messages.

    Raises:
        ValueError: for a name of nothing that can be imported.
        TypeError: if it does not make an ``nn.Module``.
    """
    if isinstance(model, nn.Module):
        return model
    function = _named(model, name) if isinstance(model, str) else model
    if not callable(function):
        raise TypeError(f"{name} must be a network, a function that makes one, or the name of one, got {model!r}")
    made: Any = function()
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name} must make an nn.Module, got {type(made).__name__} from {model!r}")
    return made


def _named(path: str, name: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name} must be 'package.module:function', got {path!r}")
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} names {path!r}, which cannot be imported: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    return found
