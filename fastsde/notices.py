"""Warnings that a process gives once."""

from __future__ import annotations

import warnings

__all__ = ["warn_once"]

_told: set[str] = set()


def warn_once(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warns, unless this process has been told the same before."""
    if message in _told:
        return
    _told.add(message)
    warnings.warn(message, category, stacklevel=2)
