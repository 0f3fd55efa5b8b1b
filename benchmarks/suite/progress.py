"""Shows on stderr what a run is doing and how far it has got."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """Shows one line that is updated in place on a terminal, and elsewhere one line per case.

    Args:
        cases: the number of cases.
        expected_s: the expected seconds for all of them.
    """

    def __init__(self, cases: int, expected_s: float) -> None:
        self._cases, self._expected, self._started = cases, expected_s, time.monotonic()
        self._rewrites, self._case, self._number = sys.stderr.isatty(), "", 0

    def begin(self, case: str) -> None:
        """Starts the next case."""
        self._number, self._case = self._number + 1, case
        if not self._rewrites:
            print(self._line(), file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """Shows the current step of the case, such as the provider and its number."""
        if self._rewrites:
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{f'{self._line()}: {what}'[: width - 1]}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the line, before something else is printed."""
        if self._rewrites:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _line(self) -> str:
        spent = time.monotonic() - self._started
        return f"[{self._number}/{self._cases}, {clock(spent)} of about {clock(self._expected)}] {self._case}"


def clock(seconds: float) -> str:
    """Returns a time as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
