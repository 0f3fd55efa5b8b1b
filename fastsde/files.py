"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "check_writable"]


def _temporary(path: Path) -> Path:
    """A new file beside ``path``, whose folder is made where it is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=f".tmp{path.suffix}", dir=path.parent)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    return Path(name)


def check_writable(path: str | Path) -> None:
    """For a path that is written at the end of long work: raises OSError now where it cannot be."""
    _temporary(Path(path)).unlink()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it replaces ``path`` at once when the block ends without an error.

    The temporary name keeps the suffix of ``path``, which many writers choose their format by. What a killed process
    leaves behind starts with a dot and ends in that suffix; it never has the name of a real file.
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
