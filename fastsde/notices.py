"""What users are told: warnings that point at their own line, and errors in one line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

__all__ = ["first_line", "warn", "warn_once"]

# The code between the user's line and the warning: this package, and the compiler's wrapper of untraced functions.
_OURS = (str(Path(__file__).parent), str(Path("torch", "_dynamo")))
_told: dict[str, Any] = {}


def warn(message: str) -> None:
    """Issues a RuntimeWarning at the innermost line outside of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and any(path in frame.f_code.co_filename for path in _OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def warn_once(message: str, told: MutableMapping[str, Any] | None = None) -> None:
    """Warns as `warn` does, unless the same message has been given before.

    Args:
        told: where messages are recorded; by default, once for the whole process.
    """
    told = _told if told is None else told
    if message not in told:
        told[message] = True
        warn(message)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, since CUDA's continue with advice; its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
