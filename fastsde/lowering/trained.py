"""Which elements of a network's parameters the matrices and constants of a program are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recording import NotLowered

__all__ = ["Source", "check_disjoint"]


@dataclass(frozen=True)
class Source:
    """Where a matrix or a constant of a program comes from.

    Args:
        tensor: its numbers, which look at the memory of the parameter.
        parameter: the parameter, or None if it has no gradient.
    """

    tensor: Tensor
    parameter: Tensor | None

    def of(self, like: Tensor) -> Tensor:
        """Returns the same elements of a contiguous tensor of the parameter's shape, ``[rows, columns]`` or ``[n]``."""
        if self.parameter is None:
            raise ValueError("a constant has no parameter")
        offset = self.tensor.storage_offset() - self.parameter.storage_offset()
        return like.detach().as_strided(self.tensor.shape, self.tensor.stride(), like.storage_offset() + offset)


def check_disjoint(sources: Sequence[Source]) -> None:
    """Raises `NotLowered` if two sources share an element of a parameter, whose gradient would be a sum of theirs."""
    taken: dict[int, Tensor] = {}
    for source in sources:
        if source.parameter is None:
            continue
        counts = taken.setdefault(id(source.parameter), torch.zeros_like(source.parameter, dtype=torch.int64))
        source.of(counts).add_(1)
        if not source.parameter.is_contiguous() or bool((counts > 1).any()):
            raise NotLowered("a parameter is used twice, or is not contiguous")
