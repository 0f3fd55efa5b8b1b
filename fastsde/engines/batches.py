"""How many samples run at once: the fastest number, and fewer if memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from . import capture

__all__ = ["fastest", "is_out_of_memory", "seconds"]

_SMALLEST = 16
_REPEATS = 3
_WORSE, _AS_GOOD = 1.2, 1.02  # time per sample relative to the best: where the search ends, and what counts as equal


def fastest(seconds: Callable[[int], float], n: int) -> int:
    """Returns the batch size that takes the least time per sample when ``n`` samples are split into equal batches.

    Doubles the batch until that is clearly worse, or memory runs out; first halves it if not even the smallest fits.
    Of equally fast batches it picks the smallest.

    Args:
        seconds: maps a batch size to the time that the batch takes.
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
    """Returns how long ``run(count)`` takes after a warm-up: the shortest of a few runs."""
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run(count)
        capture.wait(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out; on the CPU such an error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
