"""The folder of a training run: its log, its lock, and how often it is written to."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import checkpoints
from ..checkpoints import RUN_CHECKPOINT
from ..files import atomic_path

__all__ = ["CHECKPOINT_SECONDS", "LOG_SECONDS", "RunLog", "is_before_first_step", "locked"]

LOG_NAME, LOCK_NAME = "log.jsonl", ".lock"
# The shortest time between two writes. A step of an MLP takes microseconds, and a checkpoint milliseconds: one every
# 1000 steps, with a line every 100, would take about as long as the steps. This way they take a hundredth at most. A
# reader of the log does not notice 2 s, and a run that is killed loses 10 s of work, or ``checkpoint_every`` steps if
# they take longer.
LOG_SECONDS, CHECKPOINT_SECONDS = 2.0, 10.0


class RunLog:
    """``log.jsonl``, with a line of JSON for each logged step, written in groups.

    Lines wait until the first `append` after `LOG_SECONDS`, or until `flush`.

    Args:
        directory: the folder, which need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOG_NAME
        self._lines: list[str] = []
        self._written = -math.inf

    def drop_after(self, step: int) -> None:
        """Drops the lines of later steps, and a last line that was cut short."""
        self._lines = []
        if not self._path.exists():
            return
        kept: list[str] = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(kept))

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line, which has a "step"."""
        self._lines.append(json.dumps(line) + "\n")
        if time.monotonic() - self._written >= LOG_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all waiting lines."""
        if not self._lines:
            return
        with self._path.open("a") as file:
            file.write("".join(self._lines))
        self._lines = []
        self._written = time.monotonic()


def is_before_first_step(checkpoint: Path) -> bool:
    """Returns whether a run wrote this checkpoint before its first step, so that no work is lost without it."""
    try:
        metadata = checkpoints.read(checkpoint)[1]
        return bool(metadata["resumable"]) and metadata["record"]["step"] == 0
    except (KeyError, TypeError, ValueError):  # not written by a run: it is kept
        return False


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks the folder against other processes; the lock is released with the process, however it ends.

    Processes that it forks, such as those that load data and may outlive it by seconds, do not keep the lock.

    Raises:
        RuntimeError: if another process holds the lock.
    """
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is training in {directory}") from None
        for name in (RUN_CHECKPOINT, LOG_NAME):
            for stale in directory.glob(f".{Path(name).stem}-*.tmp*"):
                stale.unlink(missing_ok=True)
        yield
    finally:
        _held.discard(lock)
        os.close(lock)


_held: set[int] = set()  # the files of the locks of this process


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
