"""How many samples run at once: as many as are fastest, and fewer where memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from . import capture

__all__ = ["fastest", "is_out_of_memory", "seconds"]

_SMALLEST = 16
_REPEATS = 3
_WORSE, _AS_GOOD = 1.2, 1.02  # a time a sample beside the best: where the search ends, and what counts as equal


def fastest(seconds: Callable[[int], float], n: int) -> int:
    """The batch of at most ``n`` samples, in equal parts of them, that takes the least time a sample.

    Doubles the batch until that is clearly worse, or memory runs out; halves it first where not even the smallest
    fits. Of equally fast batches it is the smallest.

    Args:
        seconds: how long a batch takes.
    """
    costs: dict[int, float] = {}
    batch = min(_SMALLEST, n)
    while True:
        try:
            costs[batch] = seconds(batch) / batch
        except RuntimeError as error:
            if not is_out_of_memory(error) or batch == 1:
                raise
            if costs:
                break
            batch //= 2
            continue
        if batch == n or costs[batch] > _WORSE * min(costs.values()):
            break
        batch = min(2 * batch, n)
    best = min(batch for batch, cost in costs.items() if cost <= _AS_GOOD * min(costs.values()))
    parts = -(-n // best)
    return -(-n // parts)


def seconds(run: Callable[[int], None], count: int, device: torch.device) -> float:
    """How long ``run(count)`` takes, once it has warmed up: the least of a few times."""
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run(count)
        capture.wait(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error is that of memory running out, which on the CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
