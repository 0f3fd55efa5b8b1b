"""Libraries that only some features need: each is installed by an extra of this package, which errors name."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["MissingExtraError", "missing", "require"]

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where the name differs by more than a dash


class MissingExtraError(ImportError):
    """A feature needs a library that is not installed; the message has the command that installs it."""


def require(module: str, *, extra: str, what: str) -> Any:
    """Imports and returns a module of an optional library.

    Args:
        module: such as "matplotlib.figure".
        extra: the extra of this package that installs the library, such as "plot".
        what: what needs it, such as "pictures".

    Raises:
        MissingExtraError: if it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        message = missing(module, extra=extra, what=what)
        if find_spec(module.partition(".")[0]) is not None:  # another release, or one of its own libraries is missing
            message = message.replace("is not installed", f"cannot be imported ({error})", 1)
        raise MissingExtraError(message) from error


def missing(module: str, *, extra: str, what: str) -> str:
    """Returns the message for a library that is not installed. Arguments as for `require`."""
    root = module.partition(".")[0]
    name = _DISTRIBUTIONS.get(root, root.replace("_", "-"))
    return f"{name} is not installed; it is needed for {what}: pip install 'fastsde[{extra}]'"
