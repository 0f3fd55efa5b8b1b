"""What a trace refuses, and where in the user's code."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

__all__ = ["MismatchError", "TraceError", "user_line"]

_LIBRARIES = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).resolve().parent, Path(torch.__file__).resolve().parent)
)
_SKIPPED = {"contextlib.py", "functools.py", "copy.py"}


def user_line() -> str:
    """Returns the innermost line outside of PyTorch and this package, as "file.py:12 in function"."""
    frame = sys._getframe(1)
    found = None
    while frame is not None:
        name = frame.f_code.co_filename
        is_ours = name.startswith(_LIBRARIES) or Path(name).name in _SKIPPED or name.startswith("<")
        if not is_ours:
            found = f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}"
            break
        frame = frame.f_back  # type: ignore[assignment]
    return found or "unknown line"


class TraceError(RuntimeError):  # no TypeError: Python's operators swallow those
    """The loop does something that no table can.

    Args:
        operation: what the loop does, such as the name of a PyTorch operation.
        reason: why no table has it.
        line: the line of the user's code, as "file.py:12 in function"; by default the innermost one.
        instead: what to do instead, or None.
    """

    def __init__(self, operation: str, reason: str, line: str | None = None, instead: str | None = None) -> None:
        self.operation, self.reason, self.line = operation, reason, line or user_line()
        self.instead = instead
        hint = f"; {instead}" if instead else ""
        super().__init__(f"{operation}: {reason} ({self.line}){hint}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.operation, self.reason, self.line, self.instead)


class MismatchError(TraceError):
    """The accelerated loop differs from the loop itself by more than rounding."""
