"""How a run of many equal steps is cut into chunks, each of which is one replay of a captured graph.

A trajectory is run again and again, and is cut by `chunks`, for the fewest graphs. Training stops wherever something is
logged or saved, and is cut by `chunks_of_fixed_lengths`, which takes four graphs for any stops.
"""

from __future__ import annotations

__all__ = ["FIXED_LENGTHS", "MAX_CHUNK", "chunks", "chunks_of_fixed_lengths"]

# A replay costs the host some ten microseconds, which a few dozen steps hide. More of them take memory, and longer to
# capture.
_MIN_CHUNK, MAX_CHUNK = 20, 50
FIXED_LENGTHS = (MAX_CHUNK, 20, 5, 1)


def chunks(steps: int, every: int | None = None) -> list[int]:
    """Lengths that add up to ``steps``, of few different values.

    Args:
        every: where the run is interrupted after each ``every`` steps, since something is read there.
    """
    if every is None or every >= steps:
        length = _chunk_length(steps)
        return [length] * (steps // length) + ([steps % length] if steps % length else [])
    segments, rest = divmod(steps, every)
    return chunks(every) * segments + (chunks(rest) if rest else [])


def chunks_of_fixed_lengths(steps: int) -> list[int]:
    """`FIXED_LENGTHS` that add up to ``steps``, long ones first."""
    lengths: list[int] = []
    for length in FIXED_LENGTHS:
        lengths += [length] * (steps // length)
        steps %= length
    return lengths


def _chunk_length(steps: int) -> int:
    """The length that leaves the smallest remainder, and of several the largest: a remainder is captured too."""
    if steps <= MAX_CHUNK:
        return max(steps, 1)
    return min(range(_MIN_CHUNK, MAX_CHUNK + 1), key=lambda length: (steps % length, -length))
