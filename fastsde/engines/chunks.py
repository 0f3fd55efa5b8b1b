"""How a run of many equal steps is cut into chunks, each of which is one replay of a captured graph."""

from __future__ import annotations

__all__ = ["MAX_CHUNK", "chunks"]

# A replay costs the host some ten microseconds, which a few dozen steps hide. More of them take memory, and longer to
# capture.
_MIN_CHUNK, MAX_CHUNK = 20, 50


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


def _chunk_length(steps: int) -> int:
    """The length that leaves the smallest remainder, and of several the largest: a remainder is captured too."""
    if steps <= MAX_CHUNK:
        return max(steps, 1)
    return min(range(_MIN_CHUNK, MAX_CHUNK + 1), key=lambda length: (steps % length, -length))
