"""Splits a run of many equal steps into chunks, each of which is one replay of a captured graph.

A trajectory is run again and again, so `chunks` splits it for the fewest graphs. Training stops wherever something is
logged or saved, so `chunks_of_fixed_lengths` splits it, which needs four graphs for any stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

__all__ = ["FIXED_LENGTHS", "MAX_CHUNK", "alike", "chunks", "chunks_of_fixed_lengths"]

# A replay costs the host about ten microseconds, which a few dozen steps hide. More steps take more memory, and longer
# to capture.
_MIN_CHUNK, MAX_CHUNK = 20, 50
FIXED_LENGTHS = (MAX_CHUNK, 20, 5, 1)


def chunks(steps: int, every: int | None = None) -> list[int]:
    """Returns lengths that add up to ``steps``, with few different values.

    Args:
        every: the run is also interrupted after each ``every`` steps, where something is read; None for never.
    """
    if every is None or every >= steps:
        length = _chunk_length(steps)
        return [length] * (steps // length) + ([steps % length] if steps % length else [])
    segments, rest = divmod(steps, every)
    return chunks(every) * segments + (chunks(rest) if rest else [])


def alike(kinds: Sequence[bool], every: int | None = None) -> list[tuple[int, bool]]:
    """Returns `chunks` of steps of two kinds, each of steps of one kind: their lengths and kinds.

    Args:
        every: as for `chunks`.
    """
    every = every or len(kinds)
    runs = groupby(enumerate(kinds), lambda step: (step[0] // every, step[1]))
    return [(length, kind) for (_, kind), run in runs for length in chunks(len(list(run)))]


def chunks_of_fixed_lengths(steps: int) -> list[int]:
    """Returns `FIXED_LENGTHS` that add up to ``steps``, the longest first."""
    lengths: list[int] = []
    for length in FIXED_LENGTHS:
        lengths += [length] * (steps // length)
        steps %= length
    return lengths


def _chunk_length(steps: int) -> int:
    """Returns the length with the smallest remainder, of several the largest: a remainder is captured too."""
    if steps <= MAX_CHUNK:
        return max(steps, 1)
    return min(range(_MIN_CHUNK, MAX_CHUNK + 1), key=lambda length: (steps % length, -length))
