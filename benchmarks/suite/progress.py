"""What a run is doing and how far it has come, on stderr."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """On a terminal one line that is written anew, elsewhere a line for each case.

    Args:
        cases: how many there are.
        expected_s: how long all of them take, at a guess.
    """

    def __init__(self, cases: int, expected_s: float) -> None:
        self._cases, self._expected, self._started = cases, expected_s, time.monotonic()
        self._rewrites, self._case, self._number = sys.stderr.isatty(), "", 0

    def begin(self, case: str) -> None:
        """The next case."""
        self._number, self._case = self._number + 1, case
        if not self._rewrites:
            print(self._line(), file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """What is being done for the case, such as a provider and which of how many it is."""
        if self._rewrites:
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{f'{self._line()}: {what}'[: width - 1]}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Before something else is printed."""
        if self._rewrites:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _line(self) -> str:
        spent = time.monotonic() - self._started
        return f"[{self._number}/{self._cases}, {clock(spent)} of about {clock(self._expected)}] {self._case}"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
