"""The embedding of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Sinusoidal"]


class Sinusoidal(nn.Module):
    """Sines and cosines of a number per sample, at frequencies from ``scale`` down to ``scale / 10,000``.

    They are the positional encoding of Vaswani et al. 2017, arXiv:1706.03762, computed in fp32 or finer.

    Args:
        width: of the embedding, an even number of at least 4.
        scale: the largest frequency, in radians.
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.scale = width, scale

    def forward(self, t: Tensor) -> Tensor:
        """Maps ``[B]`` to ``[B, width]``."""
        half = self.width // 2
        place = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
        angles = t[:, None] * (self.scale * torch.exp(-math.log(10_000) * place))  # in fp32 if t is narrower
        return torch.cat((angles.sin(), angles.cos()), -1)
