"""Draws of the noise contract (the twins of ``fastsde.noise.normal``, ``bits`` and ``uniform``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import call


def normal(keys: Tensor, step: int, stream: int, out: Tensor) -> None:
    """Writes the draw of a step to ``out``, contiguous fp32 ``[n, *shape]``; ``keys`` is int64 ``[n, 2]``."""
    if out.numel():
        call("normal", keys, step, stream, len(out), math.prod(out.shape[1:]), out)


def bits(keys: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """Returns the 32-bit words of a draw, as int64 values ``[n, *shape]``."""
    out = torch.empty((len(keys), *shape), dtype=torch.int32, device="cpu")
    if out.numel():
        call("bits", keys, step, stream, len(out), math.prod(shape), out)
    return out.long() & 0xFFFFFFFF
