"""Timing in interleaved rounds: each round calls every provider once, so that disturbances affect all of them alike.

The baseline takes part twice, and the difference between its two medians is the noise of the measurement.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

Run = Callable[[], Any]
Figures = dict[str, Any]
Inputs = TypeVar("Inputs")
FEWEST_ROUNDS = 3  # for slow providers


def seconds(run: Run, device: torch.device, calls: int = 1, lead: Run = lambda: None) -> float:
    """Returns the mean seconds per call; on a GPU measured between two events, so that launches overlap with work.

    Args:
        calls: the number of calls to time together.
        lead: work for a GPU before the first event, so that it does not wait for the launch of the first call either.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    lead()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(
    providers: Mapping[str, Run],
    timer: Callable[[Run], float],
    rounds: int,
    enough: float = math.inf,
    ends: float = math.inf,
    say: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Returns the seconds of every round of each provider, and the errors of those that failed in a round.

    Each round begins with a different provider. The providers must be warm.

    Args:
        timer: runs its argument and returns the seconds that it took.
        enough: total seconds after which a provider takes part in no more rounds, once it has had three.
        ends: the time, by ``time.monotonic``, at which the last round must have ended; the first one always runs.
        say: called with the number of each round, in words.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    failures: dict[str, str] = {}
    spent = dict.fromkeys(providers, 0.0)
    for number in range(rounds):
        names = [name for name in times if len(times[name]) < FEWEST_ROUNDS or spent[name] <= enough]
        if number and time.monotonic() + sum(spent[name] / len(times[name]) for name in names) > ends:
            break
        say(f"round {number + 1} of {rounds}")
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            try:
                times[name].append(timer(providers[name]))
            except Exception as error:  # whatever it is, the other providers are still measured
                failures[name] = in_words(error)
                del times[name]
            spent[name] += time.perf_counter() - started
    return times, failures


def in_words(error: Exception) -> str:
    """Returns an error as one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def summary(times: Sequence[float]) -> Figures:
    """Returns the median and the 20th and 80th percentiles, in seconds, and the number of rounds."""
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return {
        "median_s": statistics.median(times),
        "p20_s": deciles[1],
        "p80_s": deciles[7],
        "rounds": len(times),
    }


class Rotated(Generic[Inputs]):
    """Calls ``run`` on each of ``inputs`` in turn. If they are larger than the cache, the next one is never in it."""

    def __init__(self, run: Callable[[Inputs], Any], inputs: Sequence[Inputs]) -> None:
        self.inputs = inputs
        self._run, self._turn = run, -1

    @property
    def last(self) -> Inputs:
        """The inputs of the last call."""
        return self.inputs[self._turn]

    def __call__(self) -> Any:
        self._turn = (self._turn + 1) % len(self.inputs)
        return self._run(self.last)


@contextmanager
def fp32_products(kind: Any, precision: str) -> Iterator[None]:
    """Computes fp32 products in "ieee" or "tf32": those of ``torch.backends.cuda.matmul`` or ``torch.backends.cudnn``.

    PyTorch's older switches also set its newer ones. A newer one alone would make PyTorch's own reads of the older ones
    fail, as in ``torch.export``.
    """
    before, kind.allow_tf32 = kind.allow_tf32, precision == "tf32"
    try:
        yield
    finally:
        kind.allow_tf32 = before
