"""Ctrl-C between two steps of training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["deferred_interrupt"]


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a request, which the yielded function reports; a second one interrupts at once.

    In the middle of a step, weights, optimizer and step count are not consistent.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as by nohup: it must then stay ignored
    if ignored or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    requested = threading.Event()

    def request(signum: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
