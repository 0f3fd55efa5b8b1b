"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "check_writable"]


def _temporary(path: Path) -> Path:
    """Creates a temporary file next to ``path``, and its folder if that does not exist."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=f".tmp{path.suffix}", dir=path.parent)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    return Path(name)


def check_writable(path: str | Path) -> None:
    """Raises OSError now if ``path``, which is written only at the end of long work, is not writable."""
    _temporary(Path(path)).unlink()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path next to ``path``, which replaces it atomically if the block ends without an error.

    The temporary name keeps the suffix of ``path``, from which many writers choose the format. A file that a killed
    process leaves behind starts with a dot and ends in that suffix; it never has the name of a real file.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
