"""Normals of the noise contract (the twin of ``fastsde.noise.normal``)."""

from __future__ import annotations

import math

from torch import Tensor

from .library import call


def normal(keys: Tensor, step: int, stream: int, out: Tensor) -> None:
    """Writes the draw of a step to ``out``, contiguous fp32 ``[n, *shape]``; ``keys`` is int64 ``[n, 2]``."""
    if out.numel():
        call("normal", keys, step, stream, len(out), math.prod(out.shape[1:]), out)
