"""Keys of samples (the twin of ``fastsde.noise.sample_keys``)."""

from __future__ import annotations

from torch import Tensor

from .library import call


def sample_keys(seed: int, first: int, out: Tensor) -> None:
    """Writes the keys of samples ``first``, ``first + 1``, ... to ``out``, contiguous int64 ``[n, 2]``.

    Args:
        seed, first: uint64 values, passed as the int64 with the same bits.
    """
    call("sample_keys", seed, first, len(out), out)
