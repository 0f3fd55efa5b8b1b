"""The time of a kernel on a GPU without that of Python: some calls are captured as a CUDA graph, which is replayed.

A launch from Python takes the host several times as long as a small kernel takes the GPU, so that calls one after the
other measure the host. What the host takes for a call is a figure of its own.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from fastsde.engines import capture

from .measure import Rotated, Run, seconds

_HOST_ROUNDS = 5
_HOST_CALLS = 5  # whose launches a GPU queues, so that the host waits for none of them


class Replay:
    """Calls of a run as one CUDA graph.

    Args:
        run: is to be warm.
        calls: how many at the least; each of its inputs has the same number of them.

    Raises:
        CaptureError: where a call does what no graph can hold.
    """

    def __init__(self, run: Run, device: torch.device, calls: int) -> None:
        inputs = len(run.inputs) if isinstance(run, Rotated) else 1
        self.calls = -(-calls // inputs) * inputs
        self._device, self._result = device, None
        recording = capture.Recording(device)
        recording.warm_up(run)
        self._replay = recording.record(lambda: self._call(run))

    def _call(self, run: Run) -> None:
        for _ in range(self.calls - 1):
            run()
        self._result = run()

    def __call__(self) -> Any:
        """Returns the result of the last call, in memory of the graph."""
        self._replay()
        return self._result

    def seconds(self) -> float:
        """Of the device, a call."""
        return seconds(self._replay, self._device, lead=self._replay) / self.calls


def host_seconds(run: Run, device: torch.device) -> float:
    """Seconds a call that the host is busy, while the device works on the calls before."""
    rounds = []
    for _ in range(_HOST_ROUNDS):
        capture.wait(device)
        started = time.perf_counter()
        for _ in range(_HOST_CALLS):
            run()
        rounds.append((time.perf_counter() - started) / _HOST_CALLS)
    capture.wait(device)
    return statistics.median(rounds)
