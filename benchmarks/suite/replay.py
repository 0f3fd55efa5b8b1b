"""The GPU time of a kernel, without the time of Python: several calls are captured as a CUDA graph and replayed.

Launching a small kernel from Python takes the host several times as long as the kernel takes the GPU, so that a loop of
calls measures the host. The host's time per call is recorded separately.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from fastsde.engines import capture

from .measure import Rotated, Run, seconds

_HOST_ROUNDS = 5
_HOST_CALLS = 5  # few enough that the GPU queues their launches, and the host does not wait


class Replay:
    """Several calls of a run, captured as one CUDA graph.

    Args:
        run: a warm run.
        calls: the minimum number of calls; it is rounded up so that all inputs are used equally often.

    Raises:
        CaptureError: if a call cannot be captured.
    """

    def __init__(self, run: Run, device: torch.device, calls: int) -> None:
        inputs = len(run.inputs) if isinstance(run, Rotated) else 1
        self.calls = -(-calls // inputs) * inputs
        self._run = run  # the graph uses its memory, which must live as long
        self._device, self._result = device, None
        recording = capture.Recording(device)
        recording.warm_up(run)
        self._replay = recording.record(self._call)

    def _call(self) -> None:
        for _ in range(self.calls - 1):
            self._run()
        self._result = self._run()

    def __call__(self) -> Any:
        """Replays the graph and returns the result of its last call, which is memory of the graph."""
        self._replay()
        return self._result

    def seconds(self) -> float:
        """Returns the seconds per call on the device."""
        return seconds(self._replay, self._device, lead=self._replay) / self.calls


def host_seconds(run: Run, device: torch.device) -> float:
    """Returns the seconds per call for which the host is busy while the device works on earlier calls."""
    rounds = []
    for _ in range(_HOST_ROUNDS):
        capture.wait(device)
        started = time.perf_counter()
        for _ in range(_HOST_CALLS):
            run()
        rounds.append((time.perf_counter() - started) / _HOST_CALLS)
    capture.wait(device)
    return statistics.median(rounds)
